"""Tables of benchmark scores, wrong answers and flips."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quantkit.artifacts.scores import RIGHT, VERDICTS, Difference, Score
from quantkit.cli.plain_table import plain_table, print_table

if TYPE_CHECKING:
    from quantkit.jobs.evaluate import EvaluatedBenchmark

_LONGEST = 600  # characters of an answer


def print_scores(scores: Sequence[Score], where: str) -> None:
    """Print a line per benchmark, and a second table of differences to the other model."""
    rows = plain_table(
        "benchmark", "#items", "accuracy", *(f"#{name}" for name in VERDICTS[2:]), "#tok/s"
    )
    for score in scores:
        rows.add_row(
            score.title,
            f"{score.items}" if score.whole else f"{score.items}, sample",
            score.accuracy.percents(),
            *(str(score.verdicts[name]) for name in VERDICTS[2:]),
            f"{score.tokens_per_second:.1f}",
        )
    print_table(rows, where)
    compared = [(score.title, score.against) for score in scores if score.against is not None]
    if compared:
        _print_differences(compared)


def _print_differences(compared: Sequence[tuple[str, Difference]]) -> None:
    rows = plain_table("benchmark", "#other", "difference", "#won", "#lost", "#p", "#smallest")
    for title, against in compared:
        rows.add_row(
            title,
            f"{100 * against.accuracy:.1f}%",
            against.difference.percents(),
            str(against.won),
            str(against.lost),
            f"{against.p:.3f}",
            f"{100 * against.smallest:.1f}%" if against.smallest <= 1 else "none",
        )
    print_table(rows, f"compared to {compared[0][1].other}, item by item")
    print("smallest: the least difference that could have been significant with these flips")


def print_answers(evaluated: "EvaluatedBenchmark") -> None:
    """Print the wrong answers of a benchmark; with another model, the flips alone."""
    others = {(row["id"], row["repeat"]): row for row in evaluated.others}
    for row in evaluated.records:
        other = others.get((row["id"], row["repeat"]))
        if other is None and row["verdict"] != RIGHT:
            _print_answer(evaluated.score.title, row)
        elif other is not None and (row["verdict"] == RIGHT) != (other["verdict"] == RIGHT):
            _print_answer(evaluated.score.title, row)
            print(f"the other model, {other['verdict']}:\n{_shortened(other['output'])}\n")


def _print_answer(title: str, row: dict[str, Any]) -> None:
    print(f"--- {title}, item {row['id']}: {row['verdict']}")
    print(f"{_shortened(row['prompt'][-_LONGEST:])}\n>>> {_shortened(row['output'])}\n")


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
