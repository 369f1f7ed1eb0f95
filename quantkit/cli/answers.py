"""Shared by `generate` and `chat`: loading a chat model and printing its answers."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli import console
from quantkit.cli.sampling import SamplingOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantkit.generation.chat_model import ChatModel
    from quantkit.generation.harmony import Delta

_DIM, _PLAIN = "\033[2m", "\033[0m"
System = Annotated[str | None, typer.Option(help="System prompt.")]


def open_chat_model(out: str, sampling: SamplingOptions, trust_remote_code: bool) -> "ChatModel":
    """Load a chat model, with notes on speed and reasoning effort. Raises OutputError."""
    from quantkit.backend import speed_hint
    from quantkit.generation.chat_model import ChatModel

    console.note(speed_hint())
    chat_model = ChatModel(out, trust_remote_code=trust_remote_code)
    if sampling.reasoning is not None and not chat_model.knows_effort():
        console.note(f"the chat template of {out} does not read a reasoning effort.")
    return chat_model


def print_answer(deltas: "Iterator[Delta]", *, thinks: bool = True) -> str | None:
    """Print an answer, its reasoning dimmed, on a terminal only, and only if `thinks`.

    Returns the answer, None if it was interrupted before its first word.
    """
    from quantkit.generation.harmony import FINAL

    terminal, answer, before = sys.stdout.isatty(), "", None
    try:
        for delta in deltas:
            final = delta.channel == FINAL
            answer += delta.text if final else ""
            if not final and not (terminal and thinks):
                continue
            if before not in (None, delta.channel):
                print("\n")
            before = delta.channel
            print(delta.text if final else f"{_DIM}{delta.text}{_PLAIN}", end="", flush=True)
    except KeyboardInterrupt:
        print()
        return answer or None
    print()
    return answer


def print_raw(texts: "Iterator[str]") -> str | None:
    """Print an answer with its marks, and return the text behind its last one."""
    written = ""
    try:
        for text in texts:
            written += text
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        print()
        return None
    print()
    final = written.rpartition("<|message|>")[2]
    return final.partition("<|return|>")[0].partition("<|end|>")[0]


def system_messages(text: str | None) -> list[dict[str, Any]]:
    """Return the messages before the first turn."""
    return [{"role": "system", "content": text}] if text else []


def warn_if_cut(chat_model: "ChatModel", answer: str | None, max_tokens: int) -> None:
    """Note an answer that was cut, or that never came."""
    if chat_model.truncated:
        console.note(f"cut after {max_tokens} tokens; --max-tokens allows more.")
    elif answer == "":
        console.note("no answer: the model never reached its final channel.")
