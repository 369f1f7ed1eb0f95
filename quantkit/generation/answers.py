"""Single prompts by a model's chat template, and the answers in the tokens that it generates."""

import json
import re
from collections.abc import Sequence
from datetime import date
from typing import Any

from quantkit.artifacts.scores import Answer, Call
from quantkit.calibration.chat_template import has_chat_template, normalize_messages, render_chat
from quantkit.errors import InputError
from quantkit.generation.harmony import FINAL, Channels, Delta, read_calls
from quantkit.generation.prompts import Functions

_FINAL_HEADER = "<|channel|>final<|message|>"
_THOUGHT = re.compile(r".*</think>", re.DOTALL)
_FUNCTIONS = """You can call these functions, given as JSON schemas:

{functions}

To answer, write only the call, in this form, and no other text:
[function_name(parameter_1=value_1, parameter_2=value_2)]"""


class AnswerFormat:
    """How one model reads a prompt and writes an answer. `tokenizer` is mlx-lm's.

    `effort` is the reasoning effort of gpt-oss, `today` the date that its template states.
    """

    def __init__(self, tokenizer: Any, effort: str | None, today: date) -> None:
        self._tokenizer = tokenizer
        self._variables = {"reasoning_effort": effort} if effort else {}
        self._today = today
        self._channels = Channels(tokenizer)
        template = str(getattr(tokenizer, "chat_template", None) or "")
        self._offers_tools = "tools" in template

    @property
    def has_channels(self) -> bool:
        """Whether the model writes Harmony's channels."""
        return self._channels.has_channels

    def prompt(self, text: str, functions: Functions = (), *, at_answer: bool = False) -> list[int]:
        """Return the tokens of a user's `text`, with the `functions` that the model may call.

        `at_answer` ends the prompt where the final answer begins, without reasoning. Raises
        InputError for a model without a chat template.
        """
        if not has_chat_template(self._tokenizer):
            raise InputError(
                "the model has no chat template, which this benchmark needs. Without one, "
                "mmlu-raw can be measured."
            )
        messages = [{"role": "user", "content": text}]
        tools = None
        if functions and self._offers_tools:
            tools = [{"type": "function", "function": function} for function in functions]
        elif functions:
            listed = _FUNCTIONS.format(functions=json.dumps(list(functions), ensure_ascii=False))
            messages.insert(0, {"role": "system", "content": listed})
        rendered = render_chat(
            self._tokenizer,
            normalize_messages(messages),
            tools=tools,
            add_generation_prompt=True,
            today=self._today,
            variables=self._variables,
        )
        if at_answer and self.has_channels:
            rendered += _FINAL_HEADER
        return list(self._tokenizer.encode(rendered, add_special_tokens=False))

    def plain_prompt(self, text: str) -> list[int]:
        """Return the tokens of a text to continue, without a chat template."""
        return list(self._tokenizer.encode(text))

    def answer(
        self, tokens: Sequence[int], *, truncated: bool, functions: Functions = ()
    ) -> Answer:
        """Return the answer in generated `tokens`: its final channel, and calls of `functions`."""
        deltas = list(self._channels.deltas(tokens))
        spoken = [d.text for d in deltas if d.channel == FINAL and d.recipient is None]
        final: str | None = "".join(spoken) if spoken else None
        calls = _json_calls(deltas)
        if not self.has_channels and final is not None:
            final = _without_thought(final)
            if final is not None and functions:
                calls = self._parsed_calls(final, functions)
        if final is not None and not final.strip():
            final = None
        return Answer(final, calls, truncated)

    def _parsed_calls(self, text: str, functions: Functions) -> list[Call]:
        """Return the calls in a text, by mlx-lm's parser for this model."""
        start = getattr(self._tokenizer, "tool_call_start", None)
        if not start or start not in text:
            return []
        end = getattr(self._tokenizer, "tool_call_end", None)
        calls: list[Call] = []
        for piece in text.split(start)[1:]:
            body = piece.partition(end)[0] if end else piece
            calls += parse_calls(self._tokenizer, body, functions)
        return calls


def parse_calls(tokenizer: Any, text: str, functions: Functions) -> list[Call]:
    """Return the calls in a text by mlx-lm's parser for a model without channels.

    A malformed call is the model's fault, and no call.
    """
    try:
        tools = [{"type": "function", "function": dict(function)} for function in functions]
        parsed = tokenizer.tool_parser(text, tools)
        json.dumps(parsed)  # a parser of Python's literals can return sets or bytes
    except Exception:  # noqa: BLE001  (parsers raise anything)
        return []
    calls = parsed if isinstance(parsed, list) else [parsed]
    return [(call["name"], call.get("arguments") or {}) for call in calls if _is_call(call)]


def _is_call(call: Any) -> bool:
    """Return whether a parsed call has a name and, if any, arguments that are an object."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return False
    return bool(call["name"]) and isinstance(call.get("arguments") or {}, dict)


def _json_calls(deltas: Sequence[Delta]) -> list[Call]:
    """Return the calls of functions whose arguments are a JSON object."""
    calls: list[Call] = []
    for name, text in read_calls(deltas):
        try:
            arguments = json.loads(text)
        except ValueError:
            continue
        if isinstance(arguments, dict):
            calls.append((name, arguments))
    return calls


def _without_thought(text: str) -> str | None:
    """Return a text behind its thoughts in <think> tags; None if it never leaves them."""
    behind = _THOUGHT.sub("", text)
    return None if behind.lstrip().startswith("<think>") else behind
