"""Results for a person: tables and a few lines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from quantkit.artifacts.fidelity import Fidelity, Interval
from quantkit.artifacts.inventory import Inventory
from quantkit.artifacts.plan import Plan
from quantkit.artifacts.report import Report
from quantkit.artifacts.roles import ROLES, group_roles
from quantkit.artifacts.sensitivity import SensitivityProfile
from quantkit.artifacts.speed import Speed
from quantkit.cli.plain_table import plain_table, print_table
from quantkit.formats.tiers import parse_tier, required_mlx
from quantkit.units import bits_per_weight, count, gb, gib, plural, size

if TYPE_CHECKING:
    from rich.table import Table

    from quantkit.planning.explain import Difference, Explanation
    from quantkit.publish.upload import Upload

_MOST_FILES = 8
_LARGE = 10_000_000  # bytes, below which gigabytes would be shown as 0.00


def print_inventory(inventory: Inventory) -> None:
    """Print an inventory, a line per role and storage."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for weight in inventory.weights:
        groups.setdefault((weight.role, weight.storage), []).append(weight)
    table = plain_table("role", "stored as", "#weights", "#params", "#bytes", "shapes")
    for (role, storage), weights in groups.items():
        shapes = sorted({"x".join(map(str, w.shape)) for w in weights})
        table.add_row(
            role,
            storage,
            str(len(weights)),
            count(sum(w.parameters for w in weights)),
            size(sum(w.bytes for w in weights)),
            ", ".join(shapes),
        )
    unquantized = inventory.unquantized
    types = "/".join(sorted({tensor.dtype.lower() for tensor in unquantized}))
    table.add_row(
        "norms, biases",
        types,
        str(len(unquantized)),
        count(sum(t.parameters for t in unquantized)),
        size(sum(t.bytes for t in unquantized)),
        "",
    )
    experts = ""
    if inventory.experts:
        experts = f", {inventory.experts} experts"
    if inventory.experts_per_token:
        experts += f", {inventory.experts_per_token} per token"
    title = f"{inventory.source.name}: {inventory.model_type}, {inventory.layers} layers{experts}"
    print_table(table, title)
    _totals(inventory.total_bytes, inventory.parameters, None)


def print_plan(plan: Plan, bandwidth: int | None = None) -> None:
    """Print the tier table of a plan, its totals, and its predictions."""
    print_table(_tier_table(plan), f"{plan.source.name}: {plan.origin}")
    _totals(plan.total_bytes, plan.parameters, plan.active_bytes)
    _experts(plan)
    _predictions(plan)
    if bandwidth and plan.active_bytes:
        rate = bandwidth / plan.active_bytes
        print(f"speed             {rate:.0f} tokens/s at most, at {gb(bandwidth)}/s (no KV cache)")


def _experts(plan: Plan) -> None:
    """Print the experts that a plan keeps, and the version of mlx that it needs."""
    if (pruning := plan.pruning) is not None:
        cost = "" if pruning.kl is None else f", at a predicted KL divergence of {pruning.kl:.4g}"
        print(f"experts           {pruning.count} of {pruning.experts} kept in every layer{cost}")
        print(f"                  {count(plan.kept_parameters)} parameters remain")
    if least := required_mlx(assignment.storage for assignment in plan.assignments):
        print(f"needs             mlx {least} or later")


def _predictions(plan: Plan) -> None:
    if plan.predicted_kl is not None:
        how = f"; {plan.prediction_caveat}" if plan.prediction_caveat else ""
        print(f"KL divergence     {plan.predicted_kl:.4g} nats per token predicted{how}")
    if plan.expert_shift:
        shift = f"{plan.expert_shift:.4g}"
        print(f"                  sum of KL costs {plan.sum_of_costs:.4g}, expert-shift {shift}")
    if plan.measured_kl is not None:
        print(f"                  {plan.measured_kl:.4g} measured, to nearest, on calibration text")
    if plan.quantizer != "rtn":
        tuned = f", then {plan.tuning_steps} steps of scale tuning" if plan.tuning_steps else ""
        print(f"quantizer         {plan.quantizer}{tuned}")
    if plan.optimality is not None:
        bound, gap = plan.optimality.bound, plan.optimality.gap
        print(f"within            {' and '.join(plan.optimality.limits)}")
        print(f"proven            no sum of KL costs within is below {bound:.4g}; gap {gap:.2g}")
        if plan.optimality.expert_counts:
            solved = ", ".join(map(str, plan.optimality.expert_counts))
            print(f"                  solved for {solved} experts kept")


def print_explanation(explanation: "Explanation") -> None:
    """Print an explanation: alternatives of each weight, and the next steps."""
    table = plain_table("weight", "tier", "#KL", "#up worth", "to", "#down worth", "to")
    for assignment, up, down in explanation.weights:
        table.add_row(
            assignment.name.removeprefix("model."),
            assignment.tier,
            "" if assignment.kl is None else f"{assignment.kl:.3g}",
            *(("", "") if up is None else (f"{up.worth:.3g}", up.to)),
            *(("", "") if down is None else (f"{down.worth:.3g}", down.to)),
        )
    print_table(table, "KL over price of a step: a step up pays above 1, a step down below 1")
    for kind, price in zip(("stored", "read per token"), explanation.shadow_prices, strict=False):
        print(f"price             {price * 1e9:.4g} nats per token per GB {kind}")
    for title, steps in (("more budget", explanation.up), ("less budget", explanation.down)):
        print(f"{title}       next steps, best first:")
        for step in steps:
            cost = f"saves {step.saves:.3g}" if step.saves >= 0 else f"costs {-step.saves:.3g}"
            more = f" and {len(step.weights) - 1} tied to it" if len(step.weights) > 1 else ""
            moved = f"{step.weights[0]}{more}: {step.tier} to {step.to}"
            print(f"  {moved}, {step.bytes:+,} bytes, {cost}")


def print_differences(differences: Sequence["Difference"]) -> None:
    """Print a line per weight that two plans store differently."""
    table = plain_table("weight", "first", "second", "#bytes", "#KL")
    for one in differences:
        kl = "" if one.kl is None else f"{one.kl:+.3g}"
        table.add_row(one.weight, one.before, one.after, f"{one.bytes:+,}", kl)
    more = sum(one.bytes for one in differences)
    print_table(table, f"{plural(len(differences), 'weight')} differ, {more:+,} bytes")


def plan_row(plan: Plan) -> dict[str, Any]:
    """Return a plan in one line, as JSON."""
    return {
        "origin": plan.origin,
        "total_bytes": plan.total_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "predicted_kl": plan.predicted_kl,
        "experts_kept": plan.pruning.count if plan.pruning else None,
    }


def print_frontier(
    plans: Sequence[Plan], recipes: Sequence[Plan], pruned: Sequence[Plan] = ()
) -> None:
    """Print plans by size: the best, the `pruned` ones, and recipes."""
    table = plain_table("plan", "#bytes", "#bpw", "#KL predicted")
    for plan in sorted([*plans, *pruned, *recipes], key=lambda p: p.total_bytes):
        kl = "tiers not in the profile" if plan.predicted_kl is None else f"{plan.predicted_kl:.4g}"
        name = plan.origin if plan.origin.startswith("recipe") else "best"
        if plan.pruning is not None:
            name = f"best, {plan.pruning.count} of {plan.pruning.experts} experts"
        table.add_row(name, size(plan.total_bytes), f"{plan.bits_per_weight:.3f}", kl)
    print_table(table, f"{plans[0].source.name}: the least KL at every size")


def print_report(report: Report, where: str) -> None:
    """Print the tier table of a repo, its totals, and its origin."""
    plan = report.plan
    print_table(_tier_table(plan), f"{where}: {plan.origin}, from {plan.source.name}")
    _totals(report.total_bytes, plan.parameters, plan.active_bytes)
    _experts(plan)
    _predictions(plan)
    if report.inputs_per_expert is not None:
        print(f"inputs            {report.inputs_per_expert}")
    for title, files in (("shards", report.shards), ("source", plan.source.files)):
        print(f"{title:<18}{len(files)} (size with header, sha256; in full with --json)")
        for file in files[:_MOST_FILES]:
            print(f"  {file.name}  {size(file.size)}  {(file.sha256 or '')[:16]}")
        if len(files) > _MOST_FILES:
            print(f"  and {len(files) - _MOST_FILES} more")
    if report.fidelity is not None:
        print_fidelity([report.fidelity], report.fidelity.text)
    if report.speed is not None:
        print_speed(report.speed, where)
    print("versions          " + ", ".join(f"{k} {v}" for k, v in report.versions.items()))


def print_profile(profile: SensitivityProfile) -> None:
    """Print the KL cost of each role in each tier: the sum over its weights, and the worst
    layer.
    """
    print_table(
        _cost_table(profile),
        f"{profile.source.name}: KL divergence to native in nats per token, summed over a role's "
        f"weights ({profile.method}, {profile.quantizer})",
    )
    text = profile.calibration
    print(
        f"calibration       {text.name}: {text.sequences} sequences of {text.sequence_length} "
        f"tokens, {text.documents} documents, seed {text.seed}"
    )
    if profile.relative_error is not None:
        print(f"standard error    {100 * profile.relative_error:.0f}% of an entry (median)")
    if profile.expert_shift_factor is not None:
        factor = f"{profile.expert_shift_factor:.3g}"
        print(f"expert-shift      {factor} sqrt(sum of share of layers behind a weight x its cost)")
    if kept := ", ".join(f"{n}: {kl:.3g}" for n, kl in profile.removal_costs.items()):
        print(f"experts kept      {kept} (KL divergence, all layers)")
    counts = [n for seen in profile.expert_tokens.values() for n in seen]
    if counts:
        print(f"tokens per expert {min(counts)} to {max(counts)}, median {median(counts):.0f}")
    estimated = sum(weight.estimated for weight in profile.weights)
    if estimated:
        print(f"estimated         {estimated} stacks have experts without tokens")


def _cost_table(profile: SensitivityProfile) -> "Table":
    tiers = sorted(
        {cost.tier for w in profile.weights for cost in w.costs if cost.kl > 0},
        key=lambda tier: (-parse_tier(tier).stored_bytes((1, 128)), tier),
    )
    table = plain_table("role", "#weights", *(f"#{tier}" for tier in tiers), "worst")
    for role in ROLES:
        weights = [weight for weight in profile.weights if weight.role == role]
        if not weights:
            continue
        cells = []
        for tier in tiers:
            costs = [w.by_tier[tier].kl for w in weights if tier in w.by_tier]
            cells.append(f"{sum(costs):.2g}" if len(costs) == len(weights) else "-")
        worst = max(weights, key=lambda w: max(cost.kl for cost in w.costs))
        layer = "" if worst.layer is None else f"layer {worst.layer}"
        table.add_row(role, str(len(weights)), *cells, layer)
    return table


def print_validation(check: Mapping[str, Any]) -> None:
    """Print how predictions compare to measurements."""
    faster = check["seconds_measured"] / max(check["seconds_predicted"], 1e-9)
    print(
        f"check             {check['entries']} entries measured on other documents: Spearman "
        f"{check['spearman']:.3f}, predicted / measured {check['median_ratio']:.2f} (median)"
    )
    print(
        f"time              {check['seconds_predicted']:.0f} s to predict all, "
        f"{check['seconds_measured']:.0f} s to measure all: 1/{faster:.0f}"
    )


def print_fidelity(results: Sequence[Fidelity], text: str) -> None:
    """Print a column per repo, every value with its 95% interval."""
    table = plain_table("", *(f"#{Path(result.repo).name or result.repo}" for result in results))
    table.add_row("size", *(size(result.bytes) for result in results))
    table.add_row("bits per weight", *(f"{result.bits_per_weight:.3f}" for result in results))
    table.add_row("KL mean", *(_spread(result.kl_mean) for result in results))
    for kind in results[0].kl_by_text:
        table.add_row(f"  {kind}", *(_spread(result.kl_by_text[kind]) for result in results))
    table.add_row("KL median", *(_spread(result.kl_median) for result in results))
    table.add_row("KL 95%", *(_spread(result.kl_p95) for result in results))
    table.add_row("KL 99.9%", *(_spread(result.kl_p999) for result in results))
    table.add_row("top-1 agreement", *(_spread(result.top1_agreement) for result in results))
    table.add_row("perplexity ratio", *(_spread(result.perplexity_ratio) for result in results))
    few = results[0]
    print(
        f"Against native, over {few.tokens} tokens ({few.documents} documents) of {text}; KL in "
        "nats per token, with 95% intervals"
    )
    print_table(table)


def _spread(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.value:.4g}"
    return f"{interval.value:.4g}\n{interval.low:.3g} to {interval.high:.3g}"


def print_speed(speed: Speed, where: str) -> None:
    """Print tokens per second and memory for every length of prompt."""
    table = plain_table("#prompt", "#prefill", "#generation", "#peak memory", "#weights + KV cache")
    for run in speed.runs:
        table.add_row(
            f"{run.context} tokens",
            f"{run.prefill_per_second:.1f} tok/s",
            f"{run.generated_per_second:.1f} tok/s",
            gb(run.peak_bytes),
            "" if run.predicted_bytes is None else gb(run.predicted_bytes),
        )
    print_table(table, f"{where}, on {speed.machine}")


def print_upload(upload: "Upload") -> None:
    """Print the target and the files of an upload."""
    private = "private if it is new" if upload.private else "public if it is new"
    print(f"to                {upload.repo} ({private}), branch {upload.revision or 'main'}")
    print(f"commit            {upload.message}")
    print(f"files             {len(upload.files)}, {upload.bytes:,} bytes:")
    for name, size_ in upload.files:
        print(f"  {size_:>15,}  {name}")
    print("Nothing was sent. An upload also removes shards of earlier uploads.")


def print_checks(checks: Sequence[Any]) -> None:
    """Print a line per check."""
    marks = {True: "ok  ", False: "FAIL", None: "skip"}
    for check in checks:
        print(f"{marks[check.ok]}  {check.name}: {check.detail}")


def print_verdict(checks: Sequence[Any], where: str) -> None:
    """Print the last line of a verification."""
    done = [check for check in checks if check.ok is not None]
    good = sum(check.ok for check in done)
    print(f"{where}: {good} of {len(done)} checks passed")


def _tier_table(plan: Plan) -> "Table":
    table = plain_table("tier", "roles", "#weights", "#params", "#share", "#bytes", "#bpw")
    for row in plan.tiers():
        table.add_row(
            row.tier,
            ", ".join(group_roles(row.roles)),
            str(row.weights) if row.tier != plan.unquantized.tier else "",
            count(row.parameters),
            f"{row.parameters_percent:.2f}%",
            size(row.bytes),
            f"{row.bits_per_weight:.3f}",
        )
    return table


def _totals(total: int, parameters: int, active: int | None) -> None:
    units = f"{gb(total)} = {gib(total)}" if total >= _LARGE else size(total)
    print(f"total             {total:,} bytes = {units}")
    bits = bits_per_weight(total, parameters)
    print(f"bits per weight   {bits:.3f} over {count(parameters)} parameters")
    if active is not None:
        print(f"read per token    {size(active)}")
