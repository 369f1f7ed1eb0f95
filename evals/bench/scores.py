"""Six benchmarks on the demo model: native, ours and uniform-4 at the same bytes.

    python evals/bench/scores.py --data FOLDER [--profile PROFILE] [--limit 6] [--max-tokens 96]

FOLDER has local copies of the items (docs/benchmarks.md). Repos and records stay in eval-results,
unless --results names another folder; a killed run goes on there. Without PROFILE, ours is made on
short texts, as by `quantkit demo`. The minutes count everything, the making of the repos included.
"""

import argparse
import time
from pathlib import Path

from _common import machine, save

from quantkit.calibration.calibration_set import CalibrationSpec
from quantkit.demo.build import demo_checkpoint
from quantkit.jobs.evaluate import EvaluationRequest, EvaluationSettings, evaluate
from quantkit.jobs.planning import PlanRequest
from quantkit.jobs.quantize import quantize
from quantkit.jobs.quantize_options import QuantizeOptions

FIVE = ("mmlu", "gsm8k", "ifeval", "bfcl", "humaneval")
HASH_CHAINS = 2  # prompts of 8,700 tokens, at most: they take minutes on a CPU
SHORT = QuantizeOptions(profile_text=CalibrationSpec(tokens=512), quantizer_tokens=4096)


def repos(folder: Path, profile: str) -> dict[str, Path]:
    """Repos of the same bytes, written unless they are there."""
    requests = {
        "uniform-4": PlanRequest(recipe="uniform-4"),
        "ours": PlanRequest(budget="like:uniform-4", profile=profile),
    }
    for name, request in requests.items():
        if not (folder / name).exists():
            quantize("demo", folder / name, request, SHORT if request.budget else None)
    return {name: folder / name for name in requests}


def table(args: argparse.Namespace) -> str:
    """Accuracies, and differences to the native model on the same items."""
    folder = Path(args.results)
    folder.mkdir(exist_ok=True)
    native = str(demo_checkpoint())
    settings = EvaluationSettings(max_tokens=args.max_tokens)
    chains = min(args.limit, HASH_CHAINS)
    where = (Path(args.data), folder / "records", settings)
    requests = [
        EvaluationRequest(FIVE, args.limit, *where),
        EvaluationRequest(("hashhop",), chains, *where),
    ]
    began = time.monotonic()
    written = repos(folder, args.profile)
    lines = []
    for name, repo in written.items():
        for one in (x for r in requests for x in evaluate(str(repo), r, against=native)):
            score, against = one.score, one.score.against
            lines.append(
                f"| {score.title} | {name} | {score.items} | {score.accuracy.percents()} | "
                f"{score.verdicts['truncated']} | {100 * against.accuracy:.1f}% | "
                f"{against.difference.percents()} | {against.won}, {against.lost} |"
            )
            print(lines[-1], flush=True)
    lines.sort()
    return "\n".join(
        [
            f"{machine()}; {args.limit} items of each benchmark, at most {args.max_tokens} tokens "
            f"an answer (HashHop: {chains} items); {(time.monotonic() - began) / 60:.0f} minutes.",
            "",
            "| | repo | items | accuracy | truncated | native | difference | won, lost |",
            "|---|---|---|---|---|---|---|---|",
            *lines,
        ]
    )


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--profile")
    parser.add_argument("--limit", type=int, default=6)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--results", default="eval-results")
    save(table(parser.parse_args()), "scores")


if __name__ == "__main__":
    main()
