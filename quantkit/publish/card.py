"""The model card, README.md of a repo."""

import re
from pathlib import Path

from quantkit.artifacts.plan import Plan
from quantkit.artifacts.report import Report
from quantkit.roles import group_roles
from quantkit.units import count, gb, gib, size

_FRONT_MATTER = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)
_LICENSE = re.compile(r"^license:[ \t]*[\"']?([\w.+-]+)", re.MULTILINE)


def card(report: Report, base_model: str | None, license_id: str | None) -> str:
    """The card: what is stored in which tier, sizes, origin, and how to run it.

    `base_model` is a Hub id, None for a source that is only a local folder.
    """
    plan = report.plan
    front = ["library_name: mlx", "pipeline_tag: text-generation"]
    if license_id:
        front.append(f"license: {license_id}")
    if base_model:
        front += [f"base_model: {base_model}", "base_model_relation: quantized"]
    front += ["tags:", "- mlx", "- quantkit", f"- {plan.model_type}"]
    title = (base_model or Path(plan.source.name).resolve().name).rpartition("/")[2]
    rows = [
        f"| {row.tier} | {', '.join(group_roles(row.roles))} | {count(row.parameters)} "
        f"| {row.parameters_percent:.2f}% | {size(row.bytes)} |"
        for row in plan.tiers()
    ]
    active = plan.active_bytes
    lines = [
        "---",
        *front,
        "---",
        "",
        f"# {title}, {plan.bits_per_weight:.2f} bits per weight",
        "",
        f"A mixed-precision MLX quant of {base_model or title}, made with quantkit "
        f"{report.versions['quantkit']} ({plan.origin}).",
        "",
        f"- Size: {gb(report.total_bytes)} ({gib(report.total_bytes)})",
        f"- Bits per weight, everything stored counted: {plan.bits_per_weight:.3f}",
        *([] if active is None else [f"- Read per generated token: {gb(active)}"]),
        *_divergence(plan),
        *([] if plan.rounding == "rtn" else [f"- Rounding: {plan.rounding}, on {_texts(plan)}"]),
        "",
        "| tier | roles | parameters | share | size |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "```sh",
        "pip install mlx-lm",
        'mlx_lm.generate --model PATH_OR_ID --prompt "Hello"',
        "```",
        "",
        "Hashes, versions and the tier of every weight are in `quantkit.json`.",
    ]
    return "\n".join(lines) + "\n"


def _texts(plan: Plan) -> str:
    return " and ".join(f"{text.tokens} tokens of {text.name}" for text in plan.calibrations[-1:])


def _divergence(plan: Plan) -> list[str]:
    lines = []
    if plan.predicted_kl is not None:
        how = "" if plan.rounding == "rtn" else ", if it were rounded to nearest"
        lines.append(
            f"- Predicted KL divergence to the native model, nats per token{how}: "
            f"{plan.predicted_kl:.4g}"
        )
    if plan.measured_kl is not None:
        lines.append(f"- Measured on calibration text: {plan.measured_kl:.4g}")
    return lines


def license_of(folder: Path) -> str | None:
    """The licence that the source's own card states in its front matter."""
    if not (folder / "README.md").is_file():
        return None
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    front = _FRONT_MATTER.match(text)
    match = _LICENSE.search(front.group(1)) if front else None
    return match.group(1) if match else None
