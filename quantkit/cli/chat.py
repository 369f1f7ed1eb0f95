"""`quantkit chat`: a conversation with a repo."""

import sys

from quantkit.cli.answers import (
    System,
    open_chat_model,
    print_answer,
    system_messages,
    warn_if_cut,
)
from quantkit.cli.options import Model, SamplingOptions, TrustRemoteCode


def chat(
    out: Model,
    sampling: SamplingOptions,
    system: System = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Chat with a repo. An empty line or Ctrl-D ends it, Ctrl-C an answer; `/new` starts over."""
    parameters = sampling.parameters()
    chat_model = open_chat_model(out, sampling, trust_remote_code)
    messages = system_messages(system)
    while (line := _read_line()).strip():
        if line.strip() == "/new":
            messages = system_messages(system)
            continue
        turn = [*messages, {"role": "user", "content": line}]
        answer = print_answer(chat_model.answer(turn, parameters))
        warn_if_cut(chat_model, answer, sampling.max_tokens)
        # Reasoning is not part of the conversation: gpt-oss's template drops it, too.
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
