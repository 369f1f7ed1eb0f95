"""Options of commands that sample answers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from quantkit.generation.chat_model import SamplingParameters

SAMPLING = "Sampling"

MaxTokens = Annotated[
    int, typer.Option(min=1, rich_help_panel=SAMPLING, help="Longest answer, with its reasoning.")
]


Reasoning = Annotated[
    str | None,
    typer.Option(
        metavar="EFFORT",
        rich_help_panel=SAMPLING,
        help="Reasoning effort of gpt-oss: low, medium or high.",
    ),
]


def known_effort(reasoning: str | None) -> str | None:
    """Return the effort of `--reasoning`. Raises InputError for one that gpt-oss lacks."""
    from quantkit.errors import InputError
    from quantkit.generation.chat_model import EFFORTS

    if reasoning is not None and reasoning not in EFFORTS:
        raise InputError(
            f"unknown `reasoning` effort {reasoning!r}. Use one of {', '.join(EFFORTS)}."
        )
    return reasoning


TopP = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        rich_help_panel=SAMPLING,
        help="Nucleus sampling: keep the smallest set of tokens whose probability reaches P.",
    ),
]


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample an answer."""

    max_tokens: MaxTokens = 4096
    temp: Annotated[
        float,
        typer.Option(
            "--temp",
            min=0.0,
            rich_help_panel=SAMPLING,
            help="Temperature; 0 takes the most probable token.",
        ),
    ] = 0.0
    top_p: TopP = 1.0
    reasoning: Reasoning = None
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**64 - 1, rich_help_panel=SAMPLING, help="Seed of the sampling."),
    ] = 0

    def parameters(self) -> "SamplingParameters":
        """Return the sampling parameters. Raises InputError."""
        from quantkit.generation.chat_model import SamplingParameters

        effort = known_effort(self.reasoning)
        return SamplingParameters(self.max_tokens, effort, self.temp, self.top_p, self.seed)


@dataclass(frozen=True)
class OneAnswerSampling(SamplingOptions):
    """How to sample a single answer."""

    max_tokens: MaxTokens = 1024
