"""`quantkit chat`: a conversation with a repo."""

import sys
from dataclasses import replace
from typing import Annotated

import typer

from quantkit.cli import console
from quantkit.cli.answers import (
    System,
    open_chat_model,
    print_answer,
    print_raw,
    system_messages,
    warn_if_cut,
)
from quantkit.cli.options import Model, TrustRemoteCode
from quantkit.cli.sampling import SamplingOptions, known_effort
from quantkit.errors import InputError


def chat(
    out: Model,
    sampling: SamplingOptions,
    system: System = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Print answers as they are generated, with all marks.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Chat with a repo. An empty line or Ctrl-D ends it, Ctrl-C an answer.

    `/new` starts over, `/think` hides or shows the reasoning, `/reasoning low|medium|high` sets its
    effort. `--system` is the developer message of gpt-oss. A turn reads only its new tokens.
    """
    parameters = sampling.parameters()
    chat_model = open_chat_model(out, sampling, trust_remote_code)
    messages, thinks = system_messages(system), True
    while (line := _read_line()).strip():
        command, _, argument = line.strip().partition(" ")
        if command == "/new":
            messages = system_messages(system)
        elif command == "/think":
            thinks = not thinks
            console.note("reasoning is shown." if thinks else "reasoning is hidden.")
        elif command == "/reasoning":
            try:
                parameters = replace(parameters, effort=known_effort(argument.strip()))
            except InputError as exc:
                console.note(str(exc))
        else:
            turn = [*messages, {"role": "user", "content": line}]
            if raw:
                answer = print_raw(chat_model.raw_answer(turn, parameters))
            else:
                answer = print_answer(chat_model.answer(turn, parameters), thinks=thinks)
            warn_if_cut(chat_model, answer, sampling.max_tokens)
            # Reasoning is not a message of the conversation: gpt-oss's template drops it, too.
            if answer:
                messages = [*turn, {"role": "assistant", "content": answer}]


def _read_line() -> str:
    """Read a line from the terminal; empty at its end."""
    terminal = sys.stdin.isatty()
    try:
        return input("> " if terminal else "")
    except (EOFError, KeyboardInterrupt):
        print(end="\n" if terminal else "")
        return ""
