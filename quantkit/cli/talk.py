"""`quantkit generate`, `chat` and `serve`: answers from a repo, through stock mlx-lm."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli import console
from quantkit.cli.options import (
    Json,
    Model,
    OneAnswerSampling,
    SamplingOptions,
    ServerSampling,
    TrustRemoteCode,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantkit.generation.chat_model import ChatModel
    from quantkit.generation.harmony import Delta

_DIM, _PLAIN = "\033[2m", "\033[0m"
System = Annotated[str | None, typer.Option(help="System prompt.")]


def generate(
    out: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Question; - reads it from stdin.")],
    sampling: OneAnswerSampling,
    system: System = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Ask a repo one question.

    gpt-oss answers in its final channel; its reasoning is dimmed, and shown on a terminal only, so
    that `> answer.txt` holds the answer alone.

    `quantkit generate gpt-oss-20b-16GB --reasoning low --prompt "Why is the sky blue?"`
    """
    from quantkit.generation.harmony import FINAL

    parameters = sampling.parameters()
    chat_model = _chat_model(out, sampling, trust_remote_code)
    question = sys.stdin.read() if prompt == "-" else prompt
    messages = [*_system(system), {"role": "user", "content": question}]
    if json:
        channels: dict[str, str] = {}
        for delta in chat_model.answer(messages, parameters):
            channels[delta.channel] = channels.get(delta.channel, "") + delta.text
        answer = {"answer": channels.get(FINAL), "channels": channels}
        console.print_json({**answer, "truncated": chat_model.truncated})
        return
    answered = _print_answer(chat_model.answer(messages, parameters))
    _warn(chat_model, answered, sampling.max_tokens)


def chat(
    out: Model,
    sampling: SamplingOptions,
    system: System = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Chat with a repo. An empty line or Ctrl-D ends it, Ctrl-C an answer; `/new` starts over."""
    parameters = sampling.parameters()
    chat_model = _chat_model(out, sampling, trust_remote_code)
    messages = _system(system)
    while (line := _read_line()).strip():
        if line.strip() == "/new":
            messages = _system(system)
            continue
        turn = [*messages, {"role": "user", "content": line}]
        answer = _print_answer(chat_model.answer(turn, parameters))
        _warn(chat_model, answer, sampling.max_tokens)
        # Reasoning is not part of the conversation: gpt-oss's template drops it, too.
        if answer:
            messages = [*turn, {"role": "assistant", "content": answer}]


def serve(
    out: Model,
    sampling: ServerSampling,
    port: Annotated[
        int, typer.Option(min=1, max=65535, rich_help_panel="Address", help="Port.")
    ] = 8080,
    host: Annotated[
        str, typer.Option(rich_help_panel="Address", help="Address to listen on.")
    ] = "127.0.0.1",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve a repo with mlx-lm's server: OpenAI's protocol, by default on this machine only.

    `curl localhost:8080/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hi"}]}'`
    """
    from quantkit.generation.server import serve as run_server

    options = {"max-tokens": sampling.max_tokens, "temp": sampling.temp, "top-p": sampling.top_p}
    given = [f"--{name}={value}" for name, value in options.items()]
    run_server(out, host, port, given + ["--trust-remote-code"] * trust_remote_code)


def _chat_model(out: str, sampling: SamplingOptions, trust_remote_code: bool) -> "ChatModel":
    from quantkit.backend import speed_hint
    from quantkit.generation.chat_model import ChatModel

    console.note(speed_hint())
    chat_model = ChatModel(out, trust_remote_code=trust_remote_code)
    if sampling.reasoning is not None and not chat_model.knows_effort():
        console.note(f"the chat template of {out} does not read a reasoning effort.")
    return chat_model


def _read_line() -> str:
    """Read a line from the terminal; empty at its end."""
    terminal = sys.stdin.isatty()
    try:
        return input("> " if terminal else "")
    except (EOFError, KeyboardInterrupt):
        print(end="\n" if terminal else "")
        return ""


def _print_answer(deltas: "Iterator[Delta]") -> str | None:
    """Print an answer, its reasoning dimmed and on a terminal only.

    Returns the answer, None if it was interrupted before its first word.
    """
    from quantkit.generation.harmony import FINAL

    terminal, answer, before = sys.stdout.isatty(), "", None
    try:
        for delta in deltas:
            final = delta.channel == FINAL
            answer += delta.text if final else ""
            if not final and not terminal:
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


def _system(text: str | None) -> list[dict[str, Any]]:
    return [{"role": "system", "content": text}] if text else []


def _warn(chat_model: "ChatModel", answer: str | None, max_tokens: int) -> None:
    if chat_model.truncated:
        console.note(f"cut after {max_tokens} tokens; --max-tokens allows more.")
    elif answer == "":
        console.note("no answer: the model never reached its final channel.")
