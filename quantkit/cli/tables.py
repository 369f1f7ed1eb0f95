"""Results as a person sees them: tables and a few lines."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from quantkit.artifacts.fidelity import Fidelity, Interval
from quantkit.artifacts.inventory import Inventory
from quantkit.artifacts.plan import Plan
from quantkit.artifacts.profile import CalibrationText, SensitivityProfile
from quantkit.artifacts.report import Report
from quantkit.artifacts.roles import ROLES, group_roles
from quantkit.artifacts.speed import Speed
from quantkit.formats.tiers import parse_tier
from quantkit.units import bits_per_weight, count, gb, gib, size

if TYPE_CHECKING:
    from rich.table import Column, Table

    from quantkit.planning.explain import Difference, Explanation
    from quantkit.publish.upload import Upload

_MOST_FILES = 8
_LEAST_TEXT = 14  # characters of a heading, or a column of text, over several lines
_BETWEEN = 2  # characters between two columns


def print_inventory(inventory: Inventory) -> None:
    """What a checkpoint holds, a line per role and storage."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for weight in inventory.weights:
        groups.setdefault((weight.role, weight.storage), []).append(weight)
    table = _table("role", "held in", "#weights", "#params", "#bytes", "shapes")
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
    kept = inventory.kept
    types = "/".join(sorted({tensor.dtype.lower() for tensor in kept}))
    table.add_row(
        "norms, biases",
        types,
        str(len(kept)),
        count(sum(t.parameters for t in kept)),
        size(sum(t.bytes for t in kept)),
        "",
    )
    experts = ""
    if inventory.experts:
        experts = f", {inventory.experts} experts"
    if inventory.experts_per_token:
        experts += f" of which {inventory.experts_per_token} per token"
    title = f"{inventory.source.name}: {inventory.model_type}, {inventory.layers} layers{experts}"
    _show(table, title)
    _totals(inventory.total_bytes, inventory.parameters, None)


def print_plan(plan: Plan, bandwidth: int | None = None) -> None:
    """The tier table of a plan, its totals, and what is predicted of it."""
    _show(_tier_table(plan), f"{plan.source.name}: {plan.origin}")
    _totals(plan.total_bytes, plan.parameters, plan.active_bytes)
    _predictions(plan)
    if bandwidth and plan.active_bytes:
        rate = bandwidth / plan.active_bytes
        print(f"speed             {rate:.0f} tokens/s at most, at {gb(bandwidth)}/s (no KV cache)")


def _predictions(plan: Plan) -> None:
    if plan.predicted_kl is not None:
        how = "sum of losses" if plan.rounding == "rtn" else "if rounded to nearest"
        print(f"KL divergence     {plan.predicted_kl:.4g} nats per token predicted ({how})")
    if plan.measured_kl is not None:
        print(f"                  {plan.measured_kl:.4g} measured, on calibration text")
    if plan.rounding != "rtn":
        tuned = f", then {plan.tuning_steps} steps of tuning" if plan.tuning_steps else ""
        print(f"rounding          {plan.rounding}{tuned}")
    if plan.optimality is not None:
        bound, gap = plan.optimality.bound, plan.optimality.gap
        print(f"within            {' and '.join(plan.optimality.limits)}")
        print(f"proven            no such plan is predicted below {bound:.4g}; gap {gap:.2g}")


def print_explanation(found: "Explanation") -> None:
    """Why weights have their tiers, and which would change next."""
    table = _table("weight", "tier", "#KL", "#up worth", "to", "#down worth", "to")
    for choice, up, down in found.weights:
        table.add_row(
            choice.name.removeprefix("model."),
            choice.tier,
            "" if choice.kl is None else f"{choice.kl:.3g}",
            *(("", "") if up is None else (f"{up.worth:.3g}", up.to)),
            *(("", "") if down is None else (f"{down.worth:.3g}", down.to)),
        )
    _show(table, "loss over price of a step: a step up pays above 1, a step down below 1")
    for what, price in zip(("stored", "read per token"), found.prices, strict=False):
        print(f"price             {price * 1e9:.4g} nats per token for a GB {what}")
    for title, steps in (("more budget", found.up), ("less budget", found.down)):
        print(f"{title}       next to change, the best first:")
        for step in steps:
            loss = f"saves {step.saves:.3g}" if step.saves >= 0 else f"costs {-step.saves:.3g}"
            more = f" and {len(step.weights) - 1} tied to it" if len(step.weights) > 1 else ""
            moved = f"{step.weights[0]}{more}: {step.tier} to {step.to}"
            print(f"  {moved}, {step.bytes:+,} bytes, {loss}")


def print_differences(found: Sequence["Difference"]) -> None:
    """A line per weight that two plans store differently."""
    table = _table("weight", "first", "second", "#bytes", "#KL")
    for one in found:
        kl = "" if one.kl is None else f"{one.kl:+.3g}"
        table.add_row(one.weight, one.before, one.after, f"{one.bytes:+,}", kl)
    _show(table, f"{len(found)} weights differ, {sum(one.bytes for one in found):+,} bytes")


def plan_row(plan: Plan) -> dict[str, Any]:
    """A plan in one line, as JSON."""
    return {
        "origin": plan.origin,
        "total_bytes": plan.total_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "predicted_kl": plan.predicted_kl,
    }


def print_frontier(plans: Sequence[Plan], recipes: Sequence[Plan]) -> None:
    """Plans and recipes by size, each recipe beside the best plan of no more bytes."""
    table = _table("plan", "#bytes", "#bpw", "#KL predicted")
    for plan in sorted([*plans, *recipes], key=lambda p: p.total_bytes):
        kl = "tiers not in the profile" if plan.predicted_kl is None else f"{plan.predicted_kl:.4g}"
        name = plan.origin if plan.origin.startswith("recipe") else "best"
        table.add_row(name, size(plan.total_bytes), f"{plan.bits_per_weight:.3f}", kl)
    _show(table, f"{plans[0].source.name}: the least loss at every size")


def print_report(report: Report, where: str) -> None:
    """The tier table of a written repo, its totals, and where it came from."""
    plan = report.plan
    _show(_tier_table(plan), f"{where}: {plan.origin}, from {plan.source.name}")
    _totals(report.total_bytes, plan.parameters, plan.active_bytes)
    _predictions(plan)
    for title, files in (("shards", report.shards), ("source", plan.source.files)):
        print(f"{title:<18}{len(files)} (size with header, sha256; whole in --json)")
        for file in files[:_MOST_FILES]:
            print(f"  {file.name}  {size(file.size)}  {(file.sha256 or '')[:16]}")
        if len(files) > _MOST_FILES:
            print(f"  and {len(files) - _MOST_FILES} more")
    print("versions          " + ", ".join(f"{k} {v}" for k, v in report.versions.items()))


def print_profile(profile: SensitivityProfile) -> None:
    """What each role loses in each tier: the sum over its weights, and the worst layer."""
    tiers = sorted(
        {loss.tier for w in profile.weights for loss in w.losses if loss.kl > 0},
        key=lambda tier: (-parse_tier(tier).stored_bytes((1, 128)), tier),
    )
    table = _table("role", "#weights", *(f"#{tier}" for tier in tiers), "worst")
    for role in ROLES:
        weights = [weight for weight in profile.weights if weight.role == role]
        if not weights:
            continue
        cells = []
        for tier in tiers:
            losses = [w.by_tier[tier].kl for w in weights if tier in w.by_tier]
            cells.append(f"{sum(losses):.2g}" if len(losses) == len(weights) else "-")
        worst = max(weights, key=lambda w: max(loss.kl for loss in w.losses))
        layer = "" if worst.layer is None else f"layer {worst.layer}"
        table.add_row(role, str(len(weights)), *cells, layer)
    text = profile.calibration
    _show(
        table,
        f"{profile.source.name}: KL divergence to native in nats per token, summed over a role's "
        f"weights ({profile.method}, {profile.rounding})",
    )
    print(
        f"calibration       {text.name}: {text.sequences} sequences of {text.sequence_length} "
        f"tokens, seed {text.seed}"
    )
    errors = [loss.error / loss.kl for w in profile.weights for loss in w.losses if loss.kl > 0]
    if errors:
        print(f"standard error    {100 * median(errors):.0f}% of an entry (median)")
    counts = [n for seen in profile.expert_tokens.values() for n in seen]
    if counts:
        print(f"tokens per expert {min(counts)} to {max(counts)}, median {median(counts):.0f}")
    estimated = sum(weight.estimated for weight in profile.weights)
    if estimated:
        print(f"estimated         {estimated} stacks hold experts that saw no token")


def skipped_rows(text: CalibrationText) -> str | None:
    """A note about rows that held no text; None where there were none."""
    if not text.skipped_rows:
        return None
    return f"{text.name}: {text.skipped_rows} rows without usable text were skipped"


def print_check(check: Mapping[str, Any]) -> None:
    """How predictions compare with what was measured."""
    faster = check["seconds_measured"] / max(check["seconds_predicted"], 1e-9)
    print(
        f"check             {check['entries']} entries measured on held-out text: Spearman "
        f"{check['spearman']:.3f}, predicted / measured {check['median_ratio']:.2f} (median)"
    )
    print(
        f"time              {check['seconds_predicted']:.0f} s to predict all, "
        f"{check['seconds_measured']:.0f} s to measure all: 1/{faster:.0f}"
    )


def print_fidelity(results: Sequence[Fidelity], text: str) -> None:
    """A column per repo, every value with its 95% interval."""
    table = _table("", *(f"#{Path(found.repo).name or found.repo}" for found in results))
    table.add_row("size", *(size(found.bytes) for found in results))
    table.add_row("bits per weight", *(f"{found.bits_per_weight:.3f}" for found in results))
    table.add_row("KL mean", *(_spread(found.kl_mean) for found in results))
    for kind in results[0].kl_by_text:
        table.add_row(f"  {kind}", *(_spread(found.kl_by_text[kind]) for found in results))
    table.add_row("KL median", *(_spread(found.kl_median) for found in results))
    table.add_row("KL 95%", *(_spread(found.kl_p95) for found in results))
    table.add_row("KL 99.9%", *(_spread(found.kl_p999) for found in results))
    table.add_row("top-1 agreement", *(_spread(found.top1_agreement) for found in results))
    table.add_row("perplexity ratio", *(_spread(found.perplexity_ratio) for found in results))
    few = results[0]
    print(
        f"Against native, over {few.tokens} tokens ({few.sequences} sequences) of {text}; KL in "
        "nats per token, with 95% intervals"
    )
    _show(table)


def _spread(found: Interval) -> str:
    if found.low is None or found.high is None:
        return f"{found.value:.4g}"
    return f"{found.value:.4g}\n{found.low:.3g} to {found.high:.3g}"


def print_speed(speed: Speed, where: str) -> None:
    """Tokens per second and memory for every length of prompt."""
    table = _table("#prompt", "#prefill", "#generation", "#peak memory", "#weights + KV cache")
    for run in speed.runs:
        table.add_row(
            f"{run.context} tokens",
            f"{run.prefill_per_second:.1f} tok/s",
            f"{run.generated_per_second:.1f} tok/s",
            gb(run.peak_bytes),
            "" if run.predicted_bytes is None else gb(run.predicted_bytes),
        )
    _show(table, f"{where}, on {speed.machine}")


def print_upload(upload: "Upload") -> None:
    """What would be sent where."""
    private = "private if it is new" if upload.private else "public if it is new"
    print(f"to                {upload.repo} ({private}), branch {upload.revision or 'main'}")
    print(f"commit            {upload.message}")
    print(f"files             {len(upload.files)}, {upload.bytes:,} bytes:")
    for name, size_ in upload.files:
        print(f"  {size_:>15,}  {name}")
    print("Nothing was sent. Shards of an earlier upload would be removed there.")


def print_checks(checks: Sequence[Any]) -> None:
    """A line per check, as it is made."""
    marks = {True: "ok  ", False: "FAIL", None: "skip"}
    for check in checks:
        print(f"{marks[check.ok]}  {check.name}: {check.detail}")


def print_verdict(checks: Sequence[Any], where: str) -> None:
    """The last line of a verification."""
    made = [check for check in checks if check.ok is not None]
    good = sum(check.ok for check in made)
    print(f"{where}: {good} of {len(made)} checks passed")


def _tier_table(plan: Plan) -> "Table":
    table = _table("tier", "roles", "#weights", "#params", "#share", "#bytes", "#bpw")
    for row in plan.tiers():
        table.add_row(
            row.tier,
            ", ".join(group_roles(row.roles)),
            str(row.weights) if row.tier != plan.kept.tier else "",
            count(row.parameters),
            f"{row.parameters_percent:.2f}%",
            size(row.bytes),
            f"{row.bits_per_weight:.3f}",
        )
    return table


def _totals(total: int, parameters: int, active: int | None) -> None:
    print(f"total             {total:,} bytes = {gb(total)} = {gib(total)}")
    bits = bits_per_weight(total, parameters)
    print(f"bits per weight   {bits:.3f} over {count(parameters)} parameters")
    if active is not None:
        print(f"read per token    {gb(active)}")


def _table(*columns: str) -> "Table":
    """A plain table; a leading # aligns a column right, and its cells are never cut or broken."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for column in columns:
        number = column.startswith("#")
        table.add_column(
            Text(column.removeprefix("#")),
            justify="right" if number else "left",
            no_wrap=number,
            overflow="fold",
        )
    return table


def _show(table: "Table", title: str | None = None) -> None:
    """Print a table. Where the terminal is too narrow, headings take several lines, and what is
    still too wide is printed in parts, each of which begins with the first column."""
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    if title:
        print(title)
    for part in _parts_that_fit(table, console.width):
        console.print(part)
        print()


def _parts_that_fit(table: "Table", width: int) -> "Iterator[Table]":
    """Yield tables of some of the columns of `table`, which together hold all of them."""
    from rich.text import Text

    columns = table.columns
    if _width(columns, _longest_line) > width:
        for column in columns:
            if column.no_wrap:
                column.header = Text("\n".join(wrap(str(column.header), _LEAST_TEXT)))
    groups = [columns[:1]]
    for column in columns[1:]:
        if len(groups[-1]) > 1 and _width([*groups[-1], column], _least_width) > width:
            groups.append(columns[:1])
        groups[-1].append(column)
    for group in groups:
        part = _table()
        part.columns = [replace(column, _index=number) for number, column in enumerate(group)]
        part.rows = table.rows
        yield part


def _width(columns: Sequence["Column"], of_one: Callable[["Column"], int]) -> int:
    return sum(of_one(column) + _BETWEEN for column in columns) - _BETWEEN


def _longest_line(column: "Column") -> int:
    cells = (str(cell) for cell in (column.header, *column.cells))
    return max((len(line) for cell in cells for line in cell.splitlines()), default=0)


def _least_width(column: "Column") -> int:
    longest = _longest_line(column)
    return longest if column.no_wrap else min(longest, _LEAST_TEXT)
