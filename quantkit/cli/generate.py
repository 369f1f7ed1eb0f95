"""`quantkit generate`: one answer from a repo."""

import sys
from typing import Annotated

import typer

from quantkit.cli import console
from quantkit.cli.answers import (
    System,
    open_chat_model,
    print_answer,
    system_messages,
    warn_if_cut,
)
from quantkit.cli.options import Json, Model, TrustRemoteCode
from quantkit.cli.sampling import OneAnswerSampling


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
    chat_model = open_chat_model(out, sampling, trust_remote_code)
    question = sys.stdin.read() if prompt == "-" else prompt
    messages = [*system_messages(system), {"role": "user", "content": question}]
    if json:
        channels: dict[str, str] = {}
        for delta in chat_model.answer(messages, parameters):
            channels[delta.channel] = channels.get(delta.channel, "") + delta.text
        answer = {"answer": channels.get(FINAL), "channels": channels}
        console.print_json({**answer, "truncated": chat_model.truncated})
        return
    answered = print_answer(chat_model.answer(messages, parameters))
    warn_if_cut(chat_model, answered, sampling.max_tokens)
