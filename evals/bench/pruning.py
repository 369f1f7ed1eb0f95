"""Experts removed and bits chosen in one optimum, against bits alone and against pruning first.

    python evals/bench/pruning.py [FOLDER]          the table of budgets, for three models
    python evals/bench/pruning.py removal [FOLDER]  predicted and measured cost of removal alone
    python evals/bench/pruning.py rankings [FOLDER] what predicts best which experts to keep

The models are the demo with other biases of its routers: the logits of an expert are a(x) + b,
those of its copy -a(x) - b, so that just one of each pair is chosen, and b sets how often that is
the copy. `rare`: the copies for 2% of the tokens; `even`: for half of them, as in the demo itself;
`graded`: for 1, 5, 20 and 50%, pair by pair. All but the experts stays native. Everything is
rounded to nearest, and measured on documents that calibrated nothing. The models and their
profiles are kept in FOLDER.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from _common import machine, save

from quantkit.artifacts.experts import KeptExperts, expert_counts
from quantkit.artifacts.plan import Plan
from quantkit.artifacts.roles import EXPERT_ROLES
from quantkit.artifacts.sensitivity import SensitivityProfile
from quantkit.backend import mx
from quantkit.calibration.calibration_set import CalibrationSpec, read_calibration_set
from quantkit.calibration.splits import EVALUATE
from quantkit.checkpoint.checkpoint import open_folder
from quantkit.checkpoint.source import Source, open_source
from quantkit.demo.build import demo_checkpoint
from quantkit.errors import PlanError
from quantkit.formats.tiers import parse_tier
from quantkit.jobs.profile import profile as make_profile
from quantkit.planning.allocator import plan_by_budget
from quantkit.planning.budget import Budget
from quantkit.planning.constraints import Constraints
from quantkit.quantizers.layerwise import changed_tiers
from quantkit.sensitivity.expert_probe import ExpertProbe
from quantkit.sensitivity.expert_ranking import Projections, Saliency, fisher_saliency
from quantkit.sensitivity.fisher import Sweep
from quantkit.sensitivity.measure import ProfileSettings
from quantkit.sensitivity.validation import spearman
from quantkit.sensitivity.work import ProfileWork
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.layer_trace import hooked
from quantkit.streaming.measure_kl import measure_kl
from quantkit.streaming.weight_loader import Call

COPIES = {"rare": (0.02,) * 4, "even": (0.5,) * 4, "graded": (0.01, 0.05, 0.2, 0.5)}
SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.98)  # of the native bytes of the experts
TEXT = CalibrationSpec(tokens=2048)
SETTINGS = ProfileSettings(TEXT, experts="auto")
RANKED, REMOVED = CalibrationSpec(tokens=1024), CalibrationSpec(tokens=4096)


def router_inputs(model: StreamingModel, tokens: np.ndarray) -> dict[str, mx.array]:
    """The inputs (tokens, hidden) of every router."""
    inputs = {}

    def seen(number: int, call: Call, _y: mx.array) -> None:
        router = f"{model.layers[number].path}.mlp.router"
        with hooked(model.layers[number], [router]) as layer:
            traces = [layer.record(batch) for batch in call.batches()]
        x = mx.concatenate([trace.steps[0].args[0] for trace in traces])
        inputs[router] = x.reshape(-1, x.shape[-1])

    model.run(mx.array(tokens), seen)
    return inputs


def model_with_copies(folder: Path, shares: tuple[float, ...]) -> Path:
    """The demo, its copies chosen for these shares of the tokens, pair by pair."""
    if folder.exists():
        return folder
    source = open_source(str(demo_checkpoint()))
    text = read_calibration_set(source.checkpoint, TEXT)
    model = StreamingModel(source)
    partial = folder.with_suffix(".partial")
    shutil.copytree(demo_checkpoint(), partial, dirs_exist_ok=True)
    checkpoint = open_folder(partial)
    for router, x in router_inputs(model, text.tokens).items():
        a = np.array(x @ model.parameter(f"{router}.weight").T)[:, : len(shares)]
        b = [-np.quantile(a[:, pair], share) for pair, share in enumerate(shares)]
        values = mx.array(np.array([*b, *(-x for x in b)], np.float32)).astype(mx.bfloat16)
        stored = checkpoint.tensors[f"{router}.bias"]
        with open(partial / stored.file, "r+b") as file:
            file.seek(stored.start)
            file.write(np.array(values.view(mx.uint16)).tobytes())
    checkpoint.close()
    partial.rename(folder)
    return folder


def removed_of(kept: KeptExperts | None, experts: int) -> dict[str, list[int]]:
    """The experts that are not kept, by block."""
    kept = kept or {}
    return {block: sorted(set(range(experts)) - set(some)) for block, some in kept.items()}


def plans_of(source: Source, profile: SensitivityProfile) -> list[tuple[float, int, Plan]]:
    """(share of the bytes, experts to keep, plan), 0 experts for the joint optimum."""
    inventory = source.inventory
    experts = sum(w.bytes for w in inventory.weights if w.role in EXPERT_ROLES)
    rest = [w.name for w in inventory.weights if w.role not in EXPERT_ROLES]
    constraints = Constraints(pins=tuple((name, parse_tier("native")) for name in rest))
    every = (inventory.experts, *expert_counts(inventory))
    plans = []
    for share in SHARES:
        budget = Budget(inventory.total_bytes - int(experts * (1 - share)))
        for counts in (every, *((count,) for count in every)):
            try:
                chosen = replace(constraints, expert_counts=counts)
                plan = plan_by_budget(inventory, profile, budget, chosen)
            except PlanError:
                continue
            plans.append((share, 0 if counts is every else counts[0], plan))
    return plans


def measured(
    source: Source, plans: list[Plan], more: list[KeptExperts], spec: CalibrationSpec
) -> list[float]:
    """The KL divergences of plans, rounded to nearest, and of removals of experts alone."""
    text = read_calibration_set(source.checkpoint, spec, EVALUATE)
    experts = source.inventory.experts
    tiers = [changed_tiers(source, plan) for plan in plans] + [{} for _ in more]
    kept = [plan.pruning.kept if plan.pruning else None for plan in plans] + more
    removed = [removed_of(one, experts) for one in kept]
    found = measure_kl(
        StreamingModel(source), mx.array(text.tokens), tiers, lambda _: None, removed
    )
    return [float(kl.mean(dtype=np.float64)) for kl in found]


def budgets(folder: Path) -> str:
    """The table of the three models."""
    lines = []
    for name, shares in COPIES.items():
        source = open_source(str(model_with_copies(folder / name, shares)))
        profile = make_profile(source, folder / f"{name}-profile", SETTINGS)
        counts = expert_counts(source.inventory)
        plans = plans_of(source, profile)
        kl = measured(source, [plan for _, _, plan in plans], [], TEXT)
        for share in SHARES:
            row = {k: (plan, kl[i]) for i, (s, k, plan) in enumerate(plans) if s == share}
            plan, joint = row.pop(0)
            kept = plan.pruning.count if plan.pruning else source.inventory.experts
            best = min(value for _, value in row.values())
            cells = [f"{row[k][1]:.3f}" if k in row else "-" for k in (8, *counts)]
            lines.append(
                f"| `{name}` | {share:.0%} | {kept} of 8 | {plan.predicted_kl:.3f} | {joint:.3f} | "
                f"{' | '.join(cells)} | {joint / best:.2f} |"
            )
    return "\n".join(
        [
            f"{machine()}; profiles and measurements on {TEXT.tokens:,} tokens each, of other "
            "documents. KL divergence to the native model, in nats per token.",
            "",
            "| model | bytes of the experts | the optimum keeps | predicted | measured | all, bits "
            "alone | 7, then bits | 6 | 5 | 4 | optimum / best |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            *lines,
        ]
    )


def ranked(
    source: Source, work: Path, spec: CalibrationSpec, saliency: Saliency
) -> tuple[dict[int, float], list[KeptExperts]]:
    """The predicted cost of every number of experts, and the experts that it keeps."""
    text = read_calibration_set(source.checkpoint, spec)
    counts = expert_counts(source.inventory)
    work.mkdir(exist_ok=True)
    probe = replace(ExpertProbe.of(source.inventory, counts), saliency=saliency)
    model = StreamingModel(source)
    sweep = Sweep(model, text.tokens, (), ProfileWork(work), 2, 0, experts=probe)
    tables = sweep.run(lambda *_: None)
    orders = {b: order for table in tables for b, order in table.rankings.items()}
    costs = dict.fromkeys(counts, 0.0)
    for table in tables:
        for (_, count), kl in table.removal.items():
            costs[count] += float(kl.mean())
    return costs, [{b: sorted(map(int, o[:k])) for b, o in orders.items()} for k in counts]


def removal(folder: Path) -> str:
    """The cost of keeping the best experts and native bits: predicted and measured."""
    lines = []
    for name, shares in COPIES.items():
        source = open_source(str(model_with_copies(folder / name, shares)))
        costs, kept = ranked(source, folder / f"{name}-removal", REMOVED, fisher_saliency)
        kl = measured(source, [], kept, REMOVED)
        pairs = zip(costs.values(), kl, strict=True)
        cells = " | ".join(f"{ours:.3g}, {theirs:.3g}" for ours, theirs in pairs)
        rank = spearman(np.array([0, *costs.values()]), np.array([0, *kl]))
        lines.append(f"| `{name}` | {cells} | {rank:.2f} |")
        print(lines[-1], flush=True)
    return "\n".join(
        [
            f"{machine()}; predicted and measured on {REMOVED.tokens:,} tokens each, of other "
            "documents. KL divergence of the removal alone: predicted, measured.",
            "",
            "| model | 7 of 8 kept | 6 | 5 | 4 | Spearman |",
            "|---|---|---|---|---|---|",
            *lines,
        ]
    )


def reap(projections: Projections, mask: mx.array, _active: int) -> np.ndarray:
    """REAP: the mean, over an expert's tokens, of routing weight times norm of its output."""
    block, x = projections.block, projections.x
    weights = block.weights(x, mask)
    tokens, experts = (mx.array(i.astype(np.int32)) for i in np.nonzero(np.array(weights)))
    total = np.zeros(block.experts)
    for rows, y in block.outputs(x[tokens], experts):
        norms = weights[tokens[rows], experts[rows]] * mx.linalg.norm(y, axis=-1)
        np.add.at(total, np.array(experts[rows]), np.array(norms))
    return total / np.maximum(1, np.bincount(np.array(experts), minlength=block.experts))


def frequency(projections: Projections, mask: mx.array, _active: int) -> np.ndarray:
    """The tokens that use an expert."""
    return np.array((projections.block.weights(projections.x, mask) != 0).sum(axis=0))


def once(saliency: Saliency) -> Saliency:
    """The same, but not ranked again after experts were removed."""

    def first(projections: Projections, _mask: mx.array, active: int) -> np.ndarray:
        return saliency(projections, projections.block.mask([]), active)

    return first


SALIENCIES: dict[str, Saliency] = {
    "cost with rerouting, again after each stage": fisher_saliency,
    "the same, ranked once": once(fisher_saliency),
    "REAP": once(reap),
    "frequency": once(frequency),
}


def rankings(folder: Path) -> str:
    """What predicts best which experts to keep: the measured cost of keeping those."""
    lines = []
    for name, shares in COPIES.items():
        source = open_source(str(model_with_copies(folder / name, shares)))
        counts = expert_counts(source.inventory)
        kept = []
        for number, saliency in enumerate(SALIENCIES.values()):
            work = folder / f"{name}-ranking-{number}"
            kept += ranked(source, work, RANKED, saliency)[1]
        kl = measured(source, [], kept, RANKED)
        for number, label in enumerate(SALIENCIES):
            cells = kl[number * len(counts) : (number + 1) * len(counts)]
            lines.append(f"| `{name}` | {label} | {' | '.join(f'{x:.3g}' for x in cells)} |")
    return "\n".join(
        [
            f"{machine()}; ranked and measured on {RANKED.tokens:,} tokens each, of other "
            "documents. KL divergence of the removal alone, in nats per token.",
            "",
            "| model | ranked by | 7 of 8 kept | 6 | 5 | 4 |",
            "|---|---|---|---|---|---|",
            *lines,
        ]
    )


def main() -> None:
    """Make a table, and put it into README.md."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="*")
    args = parser.parse_args()
    tables: dict[str, tuple[Callable[[Path], str], str]] = {
        "budgets": (budgets, "pruning"),
        "removal": (removal, "pruning-removal"),
        "rankings": (rankings, "pruning-rankings"),
    }
    what = args.what[0] if args.what[:1] and args.what[0] in tables else "budgets"
    folders = [name for name in args.what if name not in tables]
    make, section = tables[what]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(folders[0] if folders else temporary)
        folder.mkdir(exist_ok=True)
        save(make(folder), section)


if __name__ == "__main__":
    main()
