"""Chat messages, and their text by the model's own chat template.

Messages are passed to the template whole: it reads `thinking`, `tool_calls`, tool results and names
itself. Only forms that templates do not share are unified: content as a list of text parts,
arguments of tool calls as a JSON string, null keys, and ShareGPT's names.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from quantkit.errors import InputError, first_line

Message = dict[str, Any]
PINNED_DATE = date(2025, 8, 5)  # for templates: the same text always gives the same tokens

_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
_REASONING = ("thinking", "reasoning_content", "reasoning")  # gpt-oss reads the first
_DIRECTIVES = "aAbBcdDeFGgHIjmMpSTuUVwWxXyYZz"


class NoTextError(InputError):
    """A message without text: its content is null, or an image."""


def normalize_messages(messages: Sequence[Any]) -> list[Message]:
    """Return chat messages in the form that chat templates expect, with all their keys.

    Accepts `role`/`content` and ShareGPT's `from`/`value`. Raises InputError for a message without
    a role, NoTextError for one without text, thinking or tool calls.
    """
    return [_normalized(message) for message in messages]


def spoken(message: Message) -> list[str]:
    """Return the thinking and the content of a normalized message that is not an instruction.

    Instructions, such as a system message, are the same in many chats.
    """
    if message["role"] in ("system", "developer"):
        return []
    return [text for key in (_REASONING[0], "content") if (text := message.get(key))]


def _normalized(given: Any) -> Message:
    if not isinstance(given, Mapping):
        raise InputError(f"the message {given!r:.40} has no role and content")
    message: Message = {str(k): without_nulls(v) for k, v in given.items() if v is not None}
    role = message.pop("from", None)
    role = message.get("role", _ROLES.get(role, role))
    if not isinstance(role, str):
        raise InputError(f"the message {message!r:.40} has no role and content")
    content = message.pop("value", None)
    content = _joined(message.get("content", content))
    reasoning = _joined(next((message[key] for key in _REASONING if message.get(key)), None))
    calls = parsed(message.pop("tool_calls", None))
    if content is None and reasoning is None and not calls:
        raise NoTextError(f"a message of {role} has no text")
    message |= {"role": role, "content": content or ""}
    if reasoning is not None:
        message |= dict.fromkeys(_REASONING[:2], reasoning)
    if calls:  # templates test whether the key exists
        if not isinstance(calls, list):
            raise InputError(f"expected a list of tool calls, found {calls!r:.40}")
        message["tool_calls"] = calls
        for call in calls:
            _parse_arguments(call)
    return message


def _joined(content: Any) -> str | None:
    """Return content as one string, joining a list of text parts. Raises NoTextError for images."""
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    stated = [item.get("text") if isinstance(item, Mapping) else item for item in parts]
    texts = [text for text in stated if isinstance(text, str)]
    if not texts or len(texts) < len(stated):
        raise NoTextError("the content of a message is not text alone")
    return "".join(texts)


def parsed(value: Any) -> Any:
    """Return the JSON value of a string, without nulls; other values stay as they are.

    Data sets store tools and tool calls as JSON strings.
    """
    try:
        return without_nulls(json.loads(value)) if isinstance(value, str) else value
    except ValueError:
        return value


def _parse_arguments(call: Any) -> None:
    """Parse the arguments of a tool call in place.

    OpenAI's protocol has them as a JSON string, which templates would quote again.
    """
    if not isinstance(call, dict):
        raise InputError(f"expected a tool call with a name and arguments, found {call!r:.40}")
    function = call["function"] if isinstance(call.get("function"), dict) else call
    function["arguments"] = parsed(function.get("arguments", {}))


def without_nulls(value: Any) -> Any:
    """Return a copy of a JSON value without null keys.

    Data sets fill in keys of other rows with null, and templates test whether a key exists.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def has_chat_template(tokenizer: Any) -> bool:
    """Return whether `tokenizer`, mlx-lm's, has a chat template."""
    return bool(getattr(tokenizer, "has_chat_template", False))


def render_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: Any = None,
    add_generation_prompt: bool = False,
    today: date | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Return the text of a chat by the template of `tokenizer`, mlx-lm's.

    `today` is the date that the template sees, by default the real one; `variables` are further
    inputs of the template, such as `reasoning_effort`. Encode the text without special tokens: the
    template has added them. Raises InputError if the template fails.
    """
    options: dict[str, Any] = dict(variables or {})
    if tools:
        options["tools"] = tools
    try:
        if today is not None and (template := _jinja_template(tokenizer, tools)) is not None:
            options["chat_template"] = _pinned(template, today)
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **options,
            )
        )
    except Exception as exc:  # templates are foreign programs: they raise anything
        raise InputError(f"the chat template cannot render it ({first_line(exc)})") from exc


def _jinja_template(tokenizer: Any, tools: Any) -> str | None:
    """Return the Jinja template in use, None if mlx-lm has a Python function instead."""
    if getattr(tokenizer, "_chat_template", None) is not None:
        return None
    return str(tokenizer.get_chat_template(None, tools))


def _pinned(template: str, today: date) -> str:
    """Return `template` with its own `strftime_now`, which always returns `today`.

    The macro shadows the function that transformers provides. Passing another function fails:
    transformers 5.24 turns callables among the arguments into strings.
    """
    steps = "".join(
        f" | replace('%{dash}{letter}', {json.dumps(today.strftime(f'%{dash}{letter}'))})"
        for letter in _DIRECTIVES
        for dash in ("-", "")
    )
    # The newline ends the tag: transformers renders with `trim_blocks`.
    return f"{{% macro strftime_now(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}\n{template}"
