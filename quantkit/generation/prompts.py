"""Prompts: the token ids of a conversation, with the places up to which others can share them."""

import base64
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Protocol

from quantkit.calibration.chat_template import (
    Message,
    has_chat_template,
    normalize_messages,
    render_chat,
)
from quantkit.errors import InputError
from quantkit.generation.harmony import ANALYSIS, COMMENTARY, FINAL
from quantkit.generation.schemas import shown_schema

# The vocabulary of gpt-oss, as tiktoken names it.
_O200K = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
_INSTRUCTIONS = ("system", "developer")
_LONG, _ENDLESS = re.compile(r"\S{2000}|\s{2000}"), re.compile(r"\S{8000}|\s{8000}")
_MOST, _BLOCK = 1 << 20, 400_000  # tokens of a prompt, letters that are encoded at once
Functions = Sequence[Mapping[str, Any]]
"""Functions by `name`, `description` and `parameters` (a JSON schema)."""


@dataclass(frozen=True)
class Prompt:
    """The tokens of a conversation. `shared` are lengths of prefixes that others begin with.

    An answer has to begin with the last `begun` tokens.
    """

    tokens: list[int]
    shared: tuple[int, ...] = ()
    begun: int = 0


@dataclass(frozen=True)
class Wishes:
    """The wishes of a conversation that a prompt states.

    `call` is the function that must be called, an empty string for any; `schema` the JSON schema
    that an answer should keep.
    """

    functions: Functions = ()
    effort: str | None = None
    call: str | None = None
    schema: Mapping[str, Any] | None = None


class TurnMemory(Protocol):
    """The tokens of earlier turns by the id of the call that they ended with."""

    def tokens(self, call: str, name: str, arguments: str) -> list[int] | None:
        """Return the tokens of a turn; None if they are forgotten, or its call was edited."""
        ...


class TemplatePrompts:
    """Prompts by a model's own chat template. `tokenizer` is mlx-lm's."""

    def __init__(self, tokenizer: Any, today: date | None = None) -> None:
        self._tokenizer = tokenizer
        self._today = today

    def prompt(
        self, messages: Sequence[Message], wishes: Wishes, memory: TurnMemory | None = None
    ) -> Prompt:
        """Return the prompt of a conversation. Raises InputError if the template refuses it."""
        del memory  # templates read text
        chat = normalize_messages(messages)
        if wishes.schema is not None:
            asked = f"Answer in JSON that keeps this schema: {json.dumps(wishes.schema)}"
            chat.insert(0, {"role": "system", "content": asked})
        if wishes.call is not None:
            raise InputError("`tool_choice` can be auto or none: this model cannot be made to call")
        chat = _one_instruction(chat)
        if not has_chat_template(self._tokenizer):
            text = "\n".join(message["content"] for message in chat)
            return Prompt(list(self._tokenizer.encode(text)))
        text = render_chat(
            self._tokenizer,
            chat,
            tools=[{"type": "function", "function": dict(one)} for one in wishes.functions] or None,
            add_generation_prompt=True,
            today=self._today,
            variables={"reasoning_effort": wishes.effort} if wishes.effort else None,
        )
        return Prompt(list(self._tokenizer.encode(text, add_special_tokens=False)))


def _split(chat: Sequence[Message]) -> tuple[list[str], Sequence[Message]]:
    """Return the instructions before the first turn, and the turns."""
    count = next((n for n, m in enumerate(chat) if m["role"] not in _INSTRUCTIONS), len(chat))
    return [message["content"] for message in chat[:count]], chat[count:]


def _one_instruction(chat: Sequence[Message]) -> list[Message]:
    """Join the instructions before the first turn, since most templates take one."""
    texts, turns = _split(chat)
    text = "\n\n".join(texts)
    others = [
        {**message, "role": "system"} if message["role"] == "developer" else message
        for message in turns
    ]
    return [{"role": "system", "content": text}, *others] if text else others


class HarmonyPrompts:
    """Prompts for gpt-oss, message by message, by openai-harmony.

    Text is always plain: marks in it are not read as marks. Reasoning before the last final answer
    is dropped; later reasoning, which belongs to unfinished work with tools, stays.
    """

    def __init__(self, encoding: Any, today: date | None = None) -> None:
        self._encoding = encoding
        self._today = today
        self._start = self._marks("<|start|>assistant")

    def prompt(
        self, messages: Sequence[Message], wishes: Wishes, memory: TurnMemory | None = None
    ) -> Prompt:
        """Return the prompt of a conversation, with the turns that `memory` still has."""
        chat = normalize_messages(messages)
        for message, given in zip(chat, messages, strict=True):
            _keep_arguments(message, given)
        texts, turns = _split(chat)
        _require_words(texts, wishes)
        tokens = self._instructions(texts, wishes)
        shared = [len(tokens)]
        answered = [n for n, m in enumerate(turns) if m["role"] == "assistant" and _is_final(m)]
        last = answered[-1] if answered else -1
        names: dict[str, str] = {}
        for number, message in enumerate(turns):
            tokens += self._turn(message, number > last, names, memory)
            if len(tokens) > _MOST:
                break  # no context is so long
        shared.append(len(tokens))
        begun = self._begun(wishes)
        return Prompt(tokens + self._start + begun, tuple(shared), len(begun))

    def _instructions(self, texts: Sequence[str], wishes: Wishes) -> list[int]:
        """Return the system message, and the developer's if there are instructions or tools."""
        from openai_harmony import DeveloperContent, ReasoningEffort, SystemContent

        system = SystemContent(
            reasoning_effort=ReasoningEffort((wishes.effort or "medium").capitalize()),
            conversation_start_date=(self._today or date.today()).isoformat(),
        )
        if wishes.schema is not None:
            name = str(wishes.schema.get("title") or "answer")
            form = f"# Response Formats\n\n## {name}\n\n{json.dumps(wishes.schema)}"
            texts = [*texts, form]
        text = "\n\n".join(text for text in texts if text)
        tokens = self._render("system", system, bool(wishes.functions))
        if text or wishes.functions:
            content = DeveloperContent(instructions=text or None)
            if wishes.functions:
                content = content.with_function_tools([_tool(one) for one in wishes.functions])
            tokens += self._render("developer", content, bool(wishes.functions))
        return tokens

    def _turn(
        self, message: Message, unfinished: bool, names: dict[str, str], memory: TurnMemory | None
    ) -> list[int]:
        role, content = message["role"], message["content"]
        if role in _INSTRUCTIONS:
            from openai_harmony import DeveloperContent

            return self._render("developer", DeveloperContent(instructions=content))
        if role == "tool":
            called = str(message.get("tool_call_id") or "")
            name = names.get(called) or message.get("name") or "unknown"
            return self._render("tool", content, channel=COMMENTARY, author=f"functions.{name}")
        if role != "assistant":
            return self._render("user", content)
        calls = [_call(call) for call in message.get("tool_calls") or ()]
        names.update({identity: name for identity, name, _ in calls})
        if unfinished and memory and len(calls) == 1 and (turn := memory.tokens(*calls[0])):
            return self._start + turn
        tokens: list[int] = []
        if unfinished and message.get("thinking"):
            tokens += self._render("assistant", message["thinking"], channel=ANALYSIS)
        if content:
            channel = COMMENTARY if calls else FINAL
            tokens += self._render("assistant", content, channel=channel)
        for _, name, arguments in calls:
            recipient = f"functions.{name}"
            tokens += self._render("assistant", arguments, channel=COMMENTARY, to=recipient)
        return tokens

    def _render(
        self, role: str, content: Any, offers: bool = False, **header: str | None
    ) -> list[int]:
        """Return the tokens of a message; `offers` if the conversation has functions.

        `header` has its channel, its recipient, and the name of its author.
        """
        if isinstance(content, str):
            return self._spoken(role, content, header)
        return self._framed(role, content, offers, header)

    def _spoken(self, role: str, text: str, header: Mapping[str, str | None]) -> list[int]:
        """Return the tokens of a message of plain text, which is encoded piece by piece.

        openai-harmony needs time that is quadratic in the length of a word.
        """
        frame = self._framed(role, "", False, header)
        tokens: list[int] = []
        text = text.encode("utf-8", "replace").decode()
        for word in _pieces(text):
            tokens += self._encoding.encode(word, disallowed_special=())
            if len(tokens) > _MOST:
                break
        return frame[:-1] + tokens + frame[-1:]

    def _framed(
        self, role: str, content: Any, offers: bool, header: Mapping[str, str | None]
    ) -> list[int]:
        from openai_harmony import Author, Message, RenderOptions, Role

        author = Author(role=Role(role), name=header.get("author"))
        message = Message.from_author_and_content(author, content)
        message.channel = header.get("channel")
        message.recipient = header.get("to") or ("assistant" if role == "tool" else None)
        message.content_type = "<|constrain|>json" if header.get("to") else None
        options = RenderOptions(conversation_has_function_tools=offers)
        return list(self._encoding.render(message, options))

    def _begun(self, wishes: Wishes) -> list[int]:
        """Return the tokens that an answer has to begin with, to make it a call."""
        if wishes.call is None or not wishes.functions:
            return []
        name = wishes.call
        if not name and len(wishes.functions) == 1:
            name = str(wishes.functions[0]["name"])
        header = self._marks(f"<|channel|>{COMMENTARY} to=functions.")
        if not name:
            return header
        plain = list(self._encoding.encode(name, disallowed_special=()))
        return header + plain + self._marks(" <|constrain|>json<|message|>")

    def _marks(self, text: str) -> list[int]:
        return list(self._encoding.encode(text, allowed_special="all"))


def _pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces that a tokenizer takes apart anyway, and too long words in several."""
    for first in range(0, len(text), _BLOCK):
        block, start = text[first : first + _BLOCK], 0
        for match in _LONG.finditer(block):
            yield block[start : match.end()]
            start = match.end()
        yield block[start:]


def _require_words(texts: Sequence[str], wishes: Wishes) -> None:
    """Check that instructions and tools have no endless words. Raises InputError."""
    described = json.dumps([list(wishes.functions), wishes.schema], ensure_ascii=False)
    if any(_ENDLESS.search(text) for text in (*texts, described)):
        raise InputError("instructions and tools cannot have words of more than 8,000 letters")


def _keep_arguments(message: Message, given: Mapping[str, Any]) -> None:
    """Take the arguments of calls as they were given: the model wrote them so."""
    calls = given.get("tool_calls")
    if not isinstance(calls, list):
        return
    for call, original in zip(message.get("tool_calls") or (), calls, strict=True):
        arguments = original.get("function", original).get("arguments")
        if isinstance(arguments, str):
            call.get("function", call)["arguments"] = arguments


def _is_final(message: Message) -> bool:
    return bool(message["content"]) and not message.get("tool_calls")


def _tool(function: Mapping[str, Any]) -> Any:
    from openai_harmony import ToolDescription

    parameters = function.get("parameters") or None
    described = str(function.get("description") or "")
    return ToolDescription(
        name=str(function["name"]), description=described, parameters=shown_schema(parameters)
    )


def _call(call: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return the id, the name and the arguments, as JSON, of a call."""
    function = call.get("function") or call
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return str(call.get("id") or ""), str(function.get("name") or "unknown"), text


def open_prompts(
    tokenizer: Any, folder: Path | None, today: date | None = None
) -> HarmonyPrompts | TemplatePrompts:
    """Return how a model is prompted: Harmony for the vocabulary of gpt-oss.

    `folder` holds the model's tokenizer.json. Other models are prompted by their chat templates.
    """
    vocabulary = _tiktoken_lines(folder / "tokenizer.json") if folder else None
    if vocabulary is None or hashlib.sha256(vocabulary).hexdigest() != _O200K:
        return TemplatePrompts(tokenizer, today)
    return HarmonyPrompts(_encoding(vocabulary), today)


def _encoding(vocabulary: bytes) -> Any:
    """Return openai-harmony's encoding, which it would fetch from the network."""
    from openai_harmony import load_harmony_encoding

    before = os.environ.get("TIKTOKEN_ENCODINGS_BASE")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "o200k_base.tiktoken").write_bytes(vocabulary)
        os.environ["TIKTOKEN_ENCODINGS_BASE"] = folder
        try:
            return load_harmony_encoding("HarmonyGptOss")
        finally:
            del os.environ["TIKTOKEN_ENCODINGS_BASE"]
            if before is not None:
                os.environ["TIKTOKEN_ENCODINGS_BASE"] = before


def _tiktoken_lines(path: Path) -> bytes | None:
    """Return the vocabulary of a tokenizer.json in tiktoken's form; None if it is of another kind.

    Byte-level BPE writes every byte as a printable character: GPT-2's table.
    """
    try:
        vocabulary = json.loads(path.read_text("utf-8"))["model"]["vocab"]
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        table = {chr(byte): byte for byte in printable}
        table |= {chr(256 + number): byte for number, byte in enumerate(others)}
        ranked = sorted(vocabulary.items(), key=lambda item: item[1])
        return b"".join(
            base64.b64encode(bytes(table[letter] for letter in token)) + b" %d\n" % rank
            for token, rank in ranked
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
