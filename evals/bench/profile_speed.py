"""The profile of today beside that of an earlier revision: seconds, predictions and plans.

    python evals/bench/profile_speed.py FOLDER [REVISION]

`quantkit profile` of both, with default tiers, one after the other, on the default text of each:
4,096 and 1,536 tokens. REVISION is a commit of this repository, by default
the last one whose profile ran attention or the experts again for every tier. 96 entries of both
profiles and the best plans of each at four budgets, rounded to nearest and in tiers that both have,
are measured on documents that calibrated nothing.
Everything is kept in FOLDER, where a killed run goes on; the table goes into README.md here.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from _common import machine, peak_gb, save, used

from quantkit.artifacts.sensitivity import SensitivityProfile
from quantkit.backend import mx
from quantkit.calibration.calibration_set import CalibrationSpec, read_calibration_set
from quantkit.calibration.splits import EVALUATE
from quantkit.checkpoint.source import Source, open_source
from quantkit.demo.build import demo_checkpoint, plain_checkpoint
from quantkit.planning.allocator import plan_by_budget
from quantkit.planning.budget import parse_budget
from quantkit.planning.constraints import Constraints
from quantkit.quantizers.layerwise import changed_tiers
from quantkit.sensitivity.entries import ALL_TIERS, Entry, candidate_entries
from quantkit.sensitivity.exact import measure_entries
from quantkit.sensitivity.store import load_profile
from quantkit.sensitivity.validation import predictions, spearman
from quantkit.sensitivity.work import ProfileWork
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.measure_kl import measure_kl

BEFORE = "4e5fa3f~1"
ROOT = Path(__file__).parents[2]
MEASURED_TOKENS = 2048
RUNS = {"before": 4096, "now": 1536}  # tokens, the default of each
SEEDS, ENTRIES = (0, 1, 2), 32  # random entries, drawn three times
BUDGETS = ("3.5bpw", "4bpw", "4.5bpw", "5.5bpw")
MODELS = {"demo": demo_checkpoint, "SmolLM2-135M": plain_checkpoint}
RESAMPLES = 2000


def profiles(folder: Path, revision: str, model: str) -> dict[str, dict]:
    """Make all profiles of `model`, unless that is done; returns seconds and memory of each."""
    before = folder / "code"
    if not before.exists():
        before.mkdir()
        archive = subprocess.run(
            ["git", "archive", revision, "quantkit"], cwd=ROOT, stdout=subprocess.PIPE, check=True
        )
        subprocess.run(["tar", "x", "-C", str(before)], input=archive.stdout, check=True)
    taken = {}
    for name, tokens in RUNS.items():
        out = folder / f"{model}-{name}"
        numbers = folder / f"{out.name}.json"
        if not numbers.exists():
            code = before if name == "before" else ROOT
            command = [sys.executable, "-m", "quantkit", "profile", str(MODELS[model]())]
            usage = used(
                [*command, "-o", str(out), "--tokens", str(tokens), "--force"],
                env={**os.environ, "PYTHONPATH": str(code)},
                cwd=folder,
            )
            seconds = usage.ru_utime + usage.ru_stime
            numbers.write_text(json.dumps({"seconds": seconds, "peak": peak_gb(usage)}))
        taken[name] = json.loads(numbers.read_text())
    return taken


def costs_of(profile: SensitivityProfile) -> dict[tuple[str, str], float]:
    """(weight, tier) -> predicted KL divergence, of all entries that have one."""
    return {key: kl for key, kl in predictions(profile).items() if kl > 0}


def restricted(profile: SensitivityProfile, keys: set[tuple[str, str]]) -> SensitivityProfile:
    """A profile without other entries than these, and those that cost nothing."""
    rows = []
    for w in profile.weights:
        costs = tuple(c for c in w.costs if c.kl == 0 or (w.name, c.tier) in keys)
        rows.append(replace(w, costs=costs))
    return replace(profile, weights=tuple(rows))


def measured_on(source: Source, tokens: mx.array, entries: list[Entry], file: Path) -> dict:
    """(weight, tier) -> measured KL divergence; `file` keeps what was measured before."""
    work = ProfileWork(file.parent)
    truth = work.costs(file.name) if work.has(file.name) else {}
    missing = [e for e in entries if e.key not in truth]
    if missing:
        started = time.monotonic()
        truth |= measure_entries(StreamingModel(source), tokens, missing, lambda _: None)
        rows = {key: kl.tolist() for key, kl in truth.items()}
        work.save_costs(file.name, rows, time.monotonic() - started)
    return {e.key: float(truth[e.key].mean()) for e in entries}


def checked(
    source: Source, tokens: mx.array, every: dict[str, SensitivityProfile], file: Path
) -> dict:
    """name -> (Spearman of all measured entries, its interval, of each draw, median ratio)."""
    predicted = {name: costs_of(profile) for name, profile in every.items()}
    common = set.intersection(*(set(costs) for costs in predicted.values()))
    candidates = candidate_entries(source.inventory.weights, ALL_TIERS)
    entries = [entry for entry in candidates if entry.key in common]
    draws = [
        [int(n) for n in np.random.default_rng(seed).permutation(len(entries))[:ENTRIES]]
        for seed in SEEDS
    ]
    chosen = [entries[number] for number in dict.fromkeys(n for draw in draws for n in draw)]
    truth = measured_on(source, tokens, chosen, file)
    result = {}
    for name, costs in predicted.items():
        guess, real = (np.array([of[e.key] for e in chosen]) for of in (costs, truth))
        rng = np.random.default_rng(0)
        some = rng.integers(0, len(chosen), (RESAMPLES, len(chosen)))
        spread = [spearman(guess[rows], real[rows]) for rows in some]
        each = [
            spearman(*(np.array([of[entries[n].key] for n in draw]) for of in (costs, truth)))
            for draw in draws
        ]
        interval = tuple(np.quantile(spread, (0.025, 0.975)))
        ratio = float(np.median(guess / np.maximum(real, 1e-12)))
        result[name] = (spearman(guess, real), interval, each, ratio)
    return result


def plans(source: Source, tokens: mx.array, every: dict[str, SensitivityProfile]) -> list:
    """(budget, measured KL divergence of the plan by each profile) for all budgets.

    Only tiers that all profiles have are used: an earlier default had tiers that help rounding to
    nearest, but not the default quantizer.
    """
    common = set.intersection(*(set(costs_of(profile)) for profile in every.values()))
    budgets = [parse_budget(text, source.inventory, source.checkpoint.settings) for text in BUDGETS]
    made = [
        plan_by_budget(
            source.inventory, restricted(profile, common), budget, Constraints(quantizer="rtn")
        )
        for budget in budgets
        for profile in every.values()
    ]
    wanted = [changed_tiers(source, plan) for plan in made]
    measured = measure_kl(StreamingModel(source), tokens, wanted, lambda _: None)
    means = [float(kl.mean(dtype=np.float64)) for kl in measured]
    count = len(every)
    return [(budget, means[count * n :][:count]) for n, budget in enumerate(BUDGETS)]


def table(folder: Path, revision: str, models: Sequence[str]) -> str:
    """All profiles of both models."""
    lines, lower = [], []
    for model in models:
        taken = profiles(folder, revision, model)
        source = open_source(str(MODELS[model]()))
        every = {
            name: load_profile(str(folder / f"{model}-{name}"), source.inventory) for name in taken
        }
        spec = CalibrationSpec(tokens=MEASURED_TOKENS)
        text = read_calibration_set(source.checkpoint, spec, EVALUATE)
        tokens = mx.array(text.tokens)
        truth = folder / f"{model}-measured.json"
        for name, (rank, interval, each, ratio) in checked(source, tokens, every, truth).items():
            share = taken["before"]["seconds"] / taken[name]["seconds"]
            lines.append(
                f"| {model}, {name} | {RUNS[name]:,} | {len(costs_of(every[name])):,} | "
                f"{taken[name]['seconds']:.0f} s | {share:.2f} | {taken[name]['peak']:.1f} GB | "
                f"{rank:.3f} ({interval[0]:.3f} to {interval[1]:.3f}) | "
                f"{', '.join(f'{x:.3f}' for x in each)} | {ratio:.2f} |"
            )
            print(lines[-1], flush=True)
        for budget, kl in plans(source, tokens, every):
            row = " | ".join(f"{x:.4f} ({x / kl[0]:.3f})" for x in kl)
            lower.append(f"| {model} | {budget} | {row} |")
            print(lower[-1], flush=True)
    return "\n".join(
        [
            f"{machine()}; CPU seconds; measured on "
            f"{tokens.size:,} tokens of {text.text.documents} other documents; before: {revision}.",
            "",
            "| | tokens | entries | time | times faster | peak memory | Spearman, 96 entries "
            "| three draws of 32 | predicted / measured |",
            "|---|---|---|---|---|---|---|---|---|",
            *lines,
            "",
            "KL divergence of the best plan by each profile, and its ratio to the one before:",
            "",
            f"| | budget | {' | '.join(RUNS)} |",
            "|---|---|---|---|",
            *lower,
        ]
    )


def main() -> None:
    """Make the table, and put it into README.md."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("revision", nargs="?", default=BEFORE)
    parser.add_argument("--model", choices=tuple(MODELS), help="only one of both, to be printed")
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    models = (args.model,) if args.model else tuple(MODELS)
    text = table(args.folder.resolve(), args.revision, models)
    if not args.model:
        save(text, "profile-speed")


if __name__ == "__main__":
    main()
