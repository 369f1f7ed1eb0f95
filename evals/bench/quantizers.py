"""Quantizers: KL divergence and top-1 agreement at the same bytes, in one run.

    python evals/bench/quantizers.py experts              experts in one tier, other weights native
    python evals/bench/quantizers.py tuned                scale tuning after gptq
    python evals/bench/quantizers.py split                what text of calibrated documents hides
    python evals/bench/quantizers.py recipes [PROFILE]    our plans at the bytes of recipes

Runs on the demo model; without a name, all. PROFILE is a profile of it (`quantkit profile demo -o
PROFILE`), made first if it is missing. Every repo is written, and compared to the native model on
documents that calibrated nothing. The tables go into README.md here.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from _common import machine, save
from allocation import BIG, demo_and_profile, experts_alone

from quantkit.artifacts.fidelity import EVALUATED_TOKENS
from quantkit.artifacts.plan import Plan
from quantkit.artifacts.roles import EXPERT_ROLES
from quantkit.artifacts.sensitivity import SensitivityProfile
from quantkit.calibration.calibration_set import CalibrationSpec, read_calibration_set
from quantkit.calibration.splits import CALIBRATE, VALIDATE
from quantkit.checkpoint.source import Source, open_source
from quantkit.demo.build import demo_checkpoint
from quantkit.evaluation import fidelity
from quantkit.evaluation.fidelity import EvaluationText
from quantkit.formats.tiers import NATIVE, parse_tier
from quantkit.jobs.compare import compare
from quantkit.jobs.quantize import write_plan
from quantkit.jobs.quantize_options import QuantizeOptions
from quantkit.planning.allocator import plan_by_budget
from quantkit.planning.budget import Budget
from quantkit.planning.constraints import Constraints
from quantkit.planning.plan import make_plan
from quantkit.planning.recipe import load_recipe, plan_by_recipe
from quantkit.progress import Progress, silent
from quantkit.quantizers.calibrated import CalibratedQuantization, QuantizerText
from quantkit.quantizers.scale_tuning import TuningText
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.writer.writer import Rewrite, rewrite

TUNED = 60  # steps
MORE_TOKENS = 65536  # four times the default
LONGER, LONGEST = 240, 320  # steps, with more tokens
NEIGHBOURS = 8192  # tokens to evaluate on, a fifth of the documents that calibrate


class Row(NamedTuple):
    """A row of a table: its plan is quantized on so many tokens, for None on the default."""

    label: str
    plan: Plan
    tokens: int | None = None


Groups = dict[str, list[Row]]


def experts_in(source: Source, tier: str) -> Plan:
    """Experts in one tier, other weights native."""
    chosen = {
        weight.name: parse_tier(tier) if weight.role in EXPERT_ROLES else NATIVE
        for weight in source.inventory.weights
    }
    return make_plan(source.inventory, chosen, f"experts {tier}")


def expert_plans(source: Source) -> Groups:
    """Experts in one tier, other weights native."""
    groups: Groups = {}
    for tier, methods in (("q3g64", ("rtn", "search", "gptq")), ("q2g32", ("rtn", "gptq"))):
        plan = experts_in(source, tier)
        group = [Row(method, replace(plan, quantizer=method)) for method in methods]
        groups[f"experts {tier}, other weights native"] = group
    return groups


def tuned_plans(source: Source) -> Groups:
    """Experts in one tier, other weights native, without scale tuning and with it."""
    groups: Groups = {}
    for tier, tokens, longer in (("q3g64", MORE_TOKENS, LONGER), ("q2g32", None, 120)):
        plan = replace(experts_in(source, tier), quantizer="gptq")
        name = "gptq" if tokens is None else f"gptq on {tokens:,} tokens"
        groups[f"experts {tier}, other weights native"] = [
            Row("gptq", plan),
            Row(f"gptq, tuned for {TUNED} steps", replace(plan, tuning_steps=TUNED)),
            Row(f"{name}, tuned for {longer} steps", replace(plan, tuning_steps=longer), tokens),
        ]
    return groups


def recipe_plans(source: Source, profile: SensitivityProfile) -> Groups:
    """Our plans at the bytes of recipes."""
    inventory = source.inventory
    groups: Groups = {}
    for name in (BIG, "uniform-4", "mxfp4-q8"):
        recipe = plan_by_recipe(inventory, load_recipe(name))
        constraints = Constraints(quantizer="gptq", routers=name == "mxfp4-q8")
        ours = plan_by_budget(
            inventory, profile, Budget(recipe.total_bytes, label=name), constraints
        )
        rows = [Row(f"`{name}`, rtn", recipe), Row("ours, gptq", ours)]
        if name == BIG:
            pinned = experts_alone(inventory, profile, recipe, "gptq")
            label = "ours for the experts alone, other weights as in the recipe"
            rows += [
                Row(f"ours, gptq, tuned for {TUNED} steps", replace(ours, tuning_steps=TUNED)),
                Row(f"{label}, gptq", pinned),
                Row(f"{label}, gptq, tuned for {TUNED} steps", replace(pinned, tuning_steps=TUNED)),
                Row(
                    f"{label}, gptq on {MORE_TOKENS:,} tokens, tuned for {LONGEST} steps",
                    replace(pinned, tuning_steps=LONGEST),
                    MORE_TOKENS,
                ),
            ]
        groups[f"at the bytes of `{name}`"] = rows
    return groups


def table(source: Source, groups: Groups, tuned: str = "") -> str:
    """What is compared with what: the first of each group is the yardstick."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (title, group) in enumerate(groups.items()):
            outs, seconds = [], []
            for i, row in enumerate(group):
                outs.append(str(Path(folder) / f"{number}-{i}"))
                started = time.monotonic()
                options = QuantizeOptions(quantizer_tokens=row.tokens)
                write_plan(source, row.plan, Path(outs[-1]), options)
                seconds.append(time.monotonic() - started)
            found = compare(source, outs)
            rows.append(f"| **{title}** | | | | | |")
            for row, result, taken in zip(group, found, seconds, strict=True):
                kl = result.kl_mean
                share = kl.value / found[0].kl_mean.value
                rows.append(
                    f"| {row.label} | {result.bits_per_weight:.3f} | {kl.value:.4f} "
                    f"({kl.low:.4f} to {kl.high:.4f}) | {share:.3f} | "
                    f"{100 * result.top1_agreement.value:.1f}% | {taken:.0f} s |"
                )
                print(rows[-1], flush=True)
    return "\n".join(
        [
            f"{machine()}; quantized on 16,384 tokens unless a row says how many,{tuned} evaluated "
            f"on {found[0].tokens:,} tokens of {found[0].documents} other documents.",
            "",
            "| | bpw | KL mean | ratio | top-1 | time |",
            "|---|---|---|---|---|---|",
            *rows,
        ]
    )


def split(source: Source) -> str:
    """KL divergence on other sequences of the documents that calibrated, and on other documents."""
    read = [
        read_calibration_set(source.checkpoint, CalibrationSpec(tokens=count), name)
        for count, name in ((5 * NEIGHBOURS, CALIBRATE), (NEIGHBOURS, VALIDATE))
    ]
    shared, validation = read
    fifth = np.arange(len(shared.tokens)) % 5 == 4
    calibrate = shared.tokens[~fifth]
    tuning = TuningText(calibrate, validation.tokens)
    text = QuantizerText(calibrate, validation.tokens, tuning)
    neighbours = EvaluationText(
        shared.text,
        shared.tokens[fifth],
        shared.documents[fifth],
        tuple(np.array(shared.kinds)[fifth]),
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        outs = [f"{folder}/rtn", f"{folder}/gptq"]
        plan = experts_in(source, "q3g64")
        write_plan(source, plan, Path(outs[0]))
        plan = replace(plan, quantizer="gptq")
        quantization = CalibratedQuantization(StreamingModel(source), plan, text)
        rewrite(Rewrite(source, plan, Path(outs[1]), quantization), lambda _: {}, Progress())
        other = fidelity.prepare(source, outs, CalibrationSpec(tokens=EVALUATED_TOKENS))
        for label, comparison in (
            ("other sequences of documents that calibrated", replace(other, text=neighbours)),
            ("other documents", other),
        ):
            found = fidelity.compare(comparison, silent)
            rtn, gptq = (result.kl_mean.value for result in found)
            rows.append(
                f"| {label} | {found[0].tokens:,} | {rtn:.4f} | {gptq:.4f} | {gptq / rtn:.3f} |"
            )
    return "\n".join(
        [
            f"{machine()}; experts q3g64, gptq on {calibrate.size:,} tokens.",
            "",
            "| evaluated on | tokens | rtn | gptq | ratio |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=("experts", "tuned", "split", "recipes"))
    parser.add_argument("profile", nargs="?")
    args = parser.parse_args()
    source = open_source(str(demo_checkpoint()))
    if args.part in (None, "experts"):
        save(table(source, expert_plans(source)), "quantizer-experts")
    if args.part in (None, "tuned"):
        save(table(source, tuned_plans(source), " 1,024 a step,"), "quantizer-tuned")
    if args.part in (None, "split"):
        save(split(source), "quantizer-split")
    if args.part in (None, "recipes"):
        source, profile = demo_and_profile(args.profile)
        save(table(source, recipe_plans(source, profile)), "quantizer-recipes")


if __name__ == "__main__":
    main()
