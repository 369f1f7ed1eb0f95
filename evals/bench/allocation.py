"""The allocator against the shipped recipes: the same bytes, the same quantizer, measured KL.

    python evals/bench/allocation.py [PROFILE]
    python evals/bench/allocation.py solver       the time of the knapsack

On the demo model, measured on documents that calibrated nothing. PROFILE is a profile of it
(`quantkit profile demo -o PROFILE`), made first if it is missing. The table goes into README.md
here.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from _common import machine, save

from quantkit.artifacts.fidelity import EVALUATED_TOKENS
from quantkit.artifacts.inventory import Inventory
from quantkit.artifacts.plan import Plan
from quantkit.artifacts.roles import EXPERT_ROLES
from quantkit.artifacts.sensitivity import SensitivityProfile
from quantkit.backend import mx
from quantkit.calibration.calibration_set import CalibrationSpec, read_calibration_set
from quantkit.calibration.splits import EVALUATE
from quantkit.checkpoint.source import Source, open_source
from quantkit.demo.build import demo_checkpoint
from quantkit.formats.tiers import parse_tier
from quantkit.jobs.profile import profile as make_profile
from quantkit.planning.allocator import plan_by_budget
from quantkit.planning.budget import Budget
from quantkit.planning.constraints import Constraints
from quantkit.planning.frontier import recipe_plans
from quantkit.planning.knapsack import solve
from quantkit.planning.knapsack_items import Option
from quantkit.quantizers.layerwise import changed_tiers
from quantkit.quantizers.registry import RTN
from quantkit.sensitivity.store import load_profile
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.measure_kl import measure_kl

BIG = "moringlabs-3.6bit"


def demo_and_profile(name: str | None) -> tuple[Source, SensitivityProfile]:
    """The demo model and the profile called `name`, made for the occasion if that is None."""
    source = open_source(str(demo_checkpoint()))
    if name:
        return source, load_profile(name, source.inventory)
    with tempfile.TemporaryDirectory() as folder:
        return source, make_profile(source, Path(folder) / "profile")


def experts_alone(
    inventory: Inventory, profile: SensitivityProfile, recipe: Plan, quantizer: str = RTN
) -> Plan:
    """The 120B's situation: all but the experts pinned to the recipe's tiers, the same bytes."""
    rest = [c for c in recipe.assignments if c.role not in EXPERT_ROLES]
    pins = tuple((assignment.name, parse_tier(assignment.tier)) for assignment in rest)
    constraints = Constraints(pins=pins, quantizer=quantizer)
    return plan_by_budget(inventory, profile, Budget(recipe.total_bytes), constraints)


def table(source: Source, profile: SensitivityProfile) -> str:
    inventory = source.inventory
    pairs = []
    for recipe in recipe_plans(inventory, profile):
        name = recipe.origin.removeprefix("recipe ")
        constraints = Constraints(
            routers=any(c.role == "router" and c.tier != "bf16" for c in recipe.assignments)
        )
        ours = plan_by_budget(
            inventory, profile, Budget(recipe.total_bytes, label=name), constraints
        )
        pairs.append((f"`{name}`", recipe, ours))
        if name == BIG:
            pinned = experts_alone(inventory, profile, recipe)
            pairs.append((f"`{name}`, other weights pinned to it", recipe, pinned))
    plans = [plan for _, recipe, ours in pairs for plan in (recipe, ours)]
    text = read_calibration_set(
        source.checkpoint, CalibrationSpec(tokens=EVALUATED_TOKENS), EVALUATE
    )
    tokens = mx.array(text.tokens)
    wanted = [changed_tiers(source, plan) for plan in plans]
    costs = measure_kl(StreamingModel(source), tokens, wanted, lambda _: None)
    found = [float(loss.mean(dtype=np.float64)) for loss in costs]
    rows = []
    for i, (name, recipe, ours) in enumerate(pairs):
        theirs_kl, ours_kl = found[2 * i : 2 * i + 2]
        guess = "-" if recipe.predicted_kl is None else f"{recipe.predicted_kl:.4f}"
        rows.append(
            f"| {name} | {recipe.bits_per_weight:.3f} | {guess} | {theirs_kl:.4f} | "
            f"{ours.bits_per_weight:.3f} | {ours.predicted_kl:.4f} | {ours_kl:.4f} | "
            f"{ours_kl / theirs_kl:.3f} |"
        )
    return "\n".join(
        [
            f"{machine()}; profile on {profile.calibration.tokens} tokens, KL divergence on "
            f"{tokens.size:,} of {text.text.documents} other documents; round-to-nearest "
            "everywhere.",
            "",
            "| bytes of | bpw | predicted | measured | ours | predicted | measured | ratio |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
        ]
    )


def solver() -> str:
    """Times of the knapsack on made-up models: 12 tiers, losses falling with the bits."""
    bits = np.array([16, 8.5, 8.25, 6.5, 5.5, 5, 4.5, 4.25, 4, 3.5, 3, 2.5])
    rows = []
    for weights, limits in ((254, 1), (254, 2), (10_000, 1), (10_000, 2)):
        rng = np.random.default_rng(0)
        items = []
        for _ in range(weights):
            size, share = 64 * int(rng.integers(10**5, 5 * 10**6)), rng.random()
            costs = np.exp(2 * rng.normal() - 1.3 * bits + 0.2 * rng.normal(size=12))
            costs = [(int(c), int(c * share))[:limits] for c in size * bits / 8]
            items.append([Option(c, float(x)) for c, x in zip(costs, costs, strict=True)])
        whole = [sum(item[0].costs[k] for item in items) for k in range(limits)]
        started = time.perf_counter()
        found = solve(items, [whole[0] * 27 // 100, *(w // 4 for w in whole[1:])])
        taken = time.perf_counter() - started
        rows.append(f"| {weights:,} | {limits} | {taken:.2f} s | {found.gap:.1g} |")
    head = ["| weights x 12 tiers | limits | time | proven gap |", "|---|---|---|---|"]
    return "\n".join([f"{machine()}.", "", *head, *rows])


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile", nargs="?")
    args = parser.parse_args()
    if args.profile == "solver":
        text = solver()
        print(text)
        save(text, "solver")
        return
    text = table(*demo_and_profile(args.profile))
    print(text)
    save(text, "allocation")


if __name__ == "__main__":
    main()
