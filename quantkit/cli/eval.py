"""`quantkit eval`: scores on benchmarks."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli import console, scores
from quantkit.cli.command_line import command_line
from quantkit.cli.options import (
    INPUT,
    OUTPUT,
    RUNTIME,
    Json,
    Model,
    Record,
    TrustRemoteCode,
    named_path,
)
from quantkit.cli.sampling import SAMPLING, Reasoning, known_effort

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantkit.artifacts.report import Report
    from quantkit.artifacts.scores import Score
    from quantkit.jobs.evaluate import EvaluationRequest


@dataclass(frozen=True)
class BenchmarkOptions:
    """The benchmarks, their items, and the model to compare to."""

    bench: Annotated[
        str,
        typer.Option(
            "--bench",
            rich_help_panel=INPUT,
            help="Benchmarks, separated by commas: mmlu, gsm8k, ifeval, bfcl, humaneval, hashhop, "
            "mmlu-raw, or .toml files.",
        ),
    ] = "mmlu,gsm8k,ifeval,bfcl,humaneval,hashhop"
    against: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=INPUT,
            help="Another folder or Hub id, such as the native model, on the same items.",
        ),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, rich_help_panel=INPUT, help="Items of each benchmark: a fixed, even sample."
        ),
    ] = None
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            parser=named_path,
            rich_help_panel=INPUT,
            help="Local JSON-lines copies of the items, instead of the Hub.",
        ),
    ] = None


@dataclass(frozen=True)
class AnswerOptions:
    """How answers are generated."""

    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=SAMPLING,
            help="Longest answer, with its reasoning. Default: as each benchmark states.",
        ),
    ] = None
    reasoning: Reasoning = None
    temperature: Annotated[
        float,
        typer.Option(min=0.0, rich_help_panel=SAMPLING, help="0 takes the most probable token."),
    ] = 0.0
    repeats: Annotated[
        int, typer.Option(min=1, rich_help_panel=SAMPLING, help="Answers to every item.")
    ] = 1
    seed: Annotated[
        int, typer.Option(min=0, rich_help_panel=SAMPLING, help="Seed of the sampling.")
    ] = 0
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=RUNTIME,
            help="Prompts answered at once. Default: as many as fit, at most 32; 16 on a CPU.",
        ),
    ] = None
    trust_remote_code: TrustRemoteCode = False


@dataclass(frozen=True)
class ScoreOptions:
    """Outputs of the scores."""

    results: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            parser=named_path,
            rich_help_panel=OUTPUT,
            help="Folder of the records: every prompt, answer and verdict. Runs resume from it.",
        ),
    ] = Path("eval-results")
    show: Annotated[
        bool,
        typer.Option("--show", rich_help_panel=OUTPUT, help="Show wrong answers, and flips."),
    ] = False
    record: Record = False
    json: Json = False


def eval(  # noqa: A001  (the name of the command)
    ctx: typer.Context,
    out: Model,
    options: BenchmarkOptions,
    answers: AnswerOptions,
    outputs: ScoreOptions,
) -> None:
    """Score a model on benchmarks: the final channel alone, with intervals and paired differences.

    Answers are recorded one by one: a killed run resumes, a finished one is only read. Checkers of
    ifeval, bfcl and humaneval are in the extra `evals` and in packages that it names.

    `quantkit eval gpt-oss-20b-16GB --bench gsm8k,ifeval --against openai/gpt-oss-20b --limit 100`
    """
    from quantkit.backend import speed_hint
    from quantkit.jobs.evaluate import evaluate
    from quantkit.publish.record import read_report

    if outputs.record:
        read_report(Path(out))  # a repo without a report is refused before the run
    request = _request(options, answers, outputs)
    console.note(speed_hint())
    with console.Bars() as progress:
        measured = evaluate(out, request, against=options.against, progress=progress)
    command = command_line(ctx)
    measured = [replace(one, score=replace(one.score, command=command)) for one in measured]
    if outputs.json:
        console.print_json({"results": [one.score.to_json() for one in measured]})
    else:
        scores.print_scores([one.score for one in measured], out)
        for one in measured if outputs.show else ():
            scores.print_answers(one)
    if outputs.record:
        report = read_report(Path(out))  # other runs may have recorded scores meanwhile
        console.record(Path(out), scores=_merged(report, [one.score for one in measured]))


def _merged(report: "Report", new: "Sequence[Score]") -> "tuple[Score, ...]":
    """Return the scores of a report, with those of the same benchmarks replaced by `new` ones."""
    measured = {one.benchmark for one in new}
    kept = [score for score in report.scores if score.benchmark not in measured]
    return (*kept, *new)


def _request(
    options: BenchmarkOptions, answers: AnswerOptions, outputs: ScoreOptions
) -> "EvaluationRequest":
    from quantkit.jobs.evaluate import EvaluationRequest, EvaluationSettings

    settings = EvaluationSettings(
        answers.max_tokens,
        known_effort(answers.reasoning),
        answers.temperature,
        seed=answers.seed,
        repeats=answers.repeats,
    )
    return EvaluationRequest(
        tuple(name.strip() for name in options.bench.split(",")),
        options.limit,
        options.data,
        outputs.results,
        settings,
        answers.batch,
        answers.trust_remote_code,
    )
