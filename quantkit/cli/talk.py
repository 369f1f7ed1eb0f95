"""`quantkit generate`, `chat` and `serve`: a repo speaks, through stock mlx-lm."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli import console
from quantkit.cli.options import Json, TrustRemoteCode
from quantkit.storage.paths import user_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantkit.generation.chat_model import ChatModel, SamplingParameters
    from quantkit.generation.harmony import Delta

_DIM, _PLAIN = "\033[2m", "\033[0m"

Model = Annotated[
    str,
    typer.Argument(
        metavar="OUT",
        parser=lambda name: str(user_path(name)),
        help="A folder or a Hub id that stock mlx-lm loads.",
    ),
]
Effort = Annotated[
    str | None,
    typer.Option("--reasoning", metavar="EFFORT", help="Of gpt-oss: low, medium or high."),
]
System = Annotated[str | None, typer.Option(help="A system prompt.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer, reasoning included.")]
Temperature = Annotated[
    float, typer.Option("--temp", min=0.0, help="0: always the likeliest token.")
]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest so much.")]
Seed = Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Of what is drawn.")]


def generate(
    out: Model,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="What to ask; - reads it from stdin.")
    ],
    system: System = None,
    reasoning: Effort = None,
    max_tokens: MaxTokens = 1024,
    temp: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Ask a repo one question, through mlx-lm's own generation.

    Of gpt-oss the final channel is the answer; what it thinks before is shown dimmed, on a terminal
    only, so that `> answer.txt` holds the answer alone.

    `quantkit generate gpt-oss-20b-16GB --reasoning low --prompt "Why is the sky blue?"`
    """
    from quantkit.generation.harmony import FINAL

    sampling = _manner(reasoning, max_tokens, temp, top_p, seed)
    chat_model = _speaker(out, reasoning, trust_remote_code)
    asked = sys.stdin.read() if prompt == "-" else prompt
    messages = [*_system(system), {"role": "user", "content": asked}]
    if json:
        said: dict[str, str] = {}
        for delta in chat_model.answer(messages, sampling):
            said[delta.channel] = said.get(delta.channel, "") + delta.text
        found = {"answer": said.get(FINAL), "channels": said, "truncated": chat_model.truncated}
        console.print_json(found)
        return
    _warn(chat_model, _print_answer(chat_model.answer(messages, sampling)), max_tokens)


def chat(
    out: Model,
    system: System = None,
    reasoning: Effort = None,
    max_tokens: MaxTokens = 4096,
    temp: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk with a repo. An empty line or Ctrl-D ends it, Ctrl-C an answer; `/new` starts anew."""
    sampling = _manner(reasoning, max_tokens, temp, top_p, seed)
    chat_model = _speaker(out, reasoning, trust_remote_code)
    messages = _system(system)
    while (asked := _ask()).strip():
        if asked.strip() == "/new":
            messages = _system(system)
            continue
        turn = [*messages, {"role": "user", "content": asked}]
        answer = _print_answer(chat_model.answer(turn, sampling))
        _warn(chat_model, answer, max_tokens)
        # What was thought is not part of the conversation: gpt-oss's template leaves it out, too.
        if answer:
            messages = [*turn, {"role": "assistant", "content": answer}]


def serve(
    out: Model,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8080,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    max_tokens: MaxTokens = 4096,
    temp: Temperature = 0.0,
    top_p: TopP = 1.0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve a repo with mlx-lm's own server: OpenAI's protocol, on this machine only by default.

    `curl localhost:8080/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hi"}]}'`
    """
    from quantkit.generation.server import serve as run_server

    options = {"max-tokens": max_tokens, "temp": temp, "top-p": top_p}
    given = [f"--{name}={value}" for name, value in options.items()]
    run_server(out, host, port, given + ["--trust-remote-code"] * trust_remote_code)


def _manner(
    effort: str | None, max_tokens: int, temperature: float, top_p: float, seed: int
) -> "SamplingParameters":
    from quantkit.errors import InputError
    from quantkit.generation.chat_model import EFFORTS, SamplingParameters

    if effort is not None and effort not in EFFORTS:
        raise InputError(f"there is no effort {effort!r}. Efforts: {', '.join(EFFORTS)}.")
    return SamplingParameters(max_tokens, effort, temperature, top_p, seed)


def _speaker(out: str, effort: str | None, trust_remote_code: bool) -> "ChatModel":
    from quantkit.backend import speed_hint
    from quantkit.generation.chat_model import ChatModel

    console.note(speed_hint())
    chat_model = ChatModel(out, trust_remote_code=trust_remote_code)
    if effort is not None and not chat_model.knows_effort():
        console.note(f"the chat template of {out} does not ask for a reasoning effort.")
    return chat_model


def _ask() -> str:
    """A line from the terminal; empty at its end."""
    terminal = sys.stdin.isatty()
    try:
        return input("> " if terminal else "")
    except (EOFError, KeyboardInterrupt):
        print(end="\n" if terminal else "")
        return ""


def _print_answer(deltas: "Iterator[Delta]") -> str | None:
    """Print what comes, what is thought dimmed and only on a terminal; gives the answer, None for
    one that was interrupted."""
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
        console.note("no answer: it never reached its final channel.")
