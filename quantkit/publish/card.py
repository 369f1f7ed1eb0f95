"""The model card, README.md of a repo. Every number in it is in `quantkit.json`, too."""

import re
from pathlib import Path

from quantkit.artifacts.fidelity import Fidelity, Interval
from quantkit.artifacts.report import Report
from quantkit.roles import group_roles
from quantkit.units import count, gib, size

CARD_FILE = "README.md"
_FRONT_MATTER = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)
_LICENSE = re.compile(r"^license:[ \t]*[\"']?([\w.+-]+)", re.MULTILINE)


def card(report: Report) -> str:
    """The card: what is stored in which tier, what was measured, how to run it and make it again.

    What was not measured is not mentioned.
    """
    plan = report.plan
    title = _title(report)
    active = plan.active_bytes
    facts = [
        f"- Size: {size(report.total_bytes)} ({gib(report.total_bytes)})",
        f"- Bits per weight, everything stored counted: {plan.bits_per_weight:.3f}",
        *([] if active is None else [f"- Read per generated token: {size(active)}"]),
        *_memory(report),
        *_choice(report),
    ]
    sections = [
        _front(report),
        f"# {title}, {plan.bits_per_weight:.2f} bits per weight",
        f"A mixed-precision MLX quant of {_linked(report)}, made with quantkit "
        f"{report.versions['quantkit']} ({plan.origin}).",
        "\n".join(facts),
        _tiers(report),
        *_fidelity(report),
        *_speed(report),
        _usage(report),
        *_origin(report),
    ]
    return "\n\n".join(sections) + "\n"


def license_of(folder: Path) -> str | None:
    """The licence that the source's own card states in its front matter."""
    if not (folder / CARD_FILE).is_file():
        return None
    try:
        text = (folder / CARD_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    front = _FRONT_MATTER.match(text)
    match = _LICENSE.search(front.group(1)) if front else None
    return match.group(1) if match else None


def _front(report: Report) -> str:
    lines = ["---", "library_name: mlx", "pipeline_tag: text-generation"]
    if report.license:
        lines.append(f"license: {report.license}")
    if report.base_model:
        lines += [f"base_model: {report.base_model}", "base_model_relation: quantized"]
    return "\n".join([*lines, "tags:", "- mlx", "- quantkit", f"- {report.plan.model_type}", "---"])


def _title(report: Report) -> str:
    return (report.base_model or report.plan.source.name).rpartition("/")[2]


def _linked(report: Report) -> str:
    base = report.base_model
    return f"[{base}](https://huggingface.co/{base})" if base else _title(report)


def _memory(report: Report) -> list[str]:
    memory = report.memory
    if memory is None:
        return []
    fits = f"Macs with {memory.smallest_mac_gib} GB of memory or more"
    if memory.smallest_mac_gib is None:
        fits = "no Mac that is sold"
    return [
        f"- Memory: {size(memory.needed_bytes)} for the weights, {memory.context} tokens of KV "
        f"cache ({size(memory.cache_bytes)}) and {size(memory.reserve_bytes)} in reserve; "
        f"computed, that is {fits}"
    ]


def _choice(report: Report) -> list[str]:
    """How tiers were chosen and values rounded."""
    plan, lines = report.plan, []
    if plan.predicted_kl is not None:
        how = "" if plan.rounding == "rtn" else ", if it were rounded to nearest"
        lines.append(
            f"- Predicted KL divergence to the native model, nats per token{how}: "
            f"{plan.predicted_kl:.4g}"
        )
    if plan.measured_kl is not None:
        lines.append(f"- Measured on calibration text, to nearest: {plan.measured_kl:.4g}")
    tuned = f", then {plan.tuned_steps} steps of tuning" if plan.tuned_steps else ""
    lines.append(f"- Rounding: {plan.rounding}{tuned}")
    for text in plan.calibrations:
        lines.append(
            f"- Calibrated on {text.tokens} tokens of {text.name} ({text.sequences} sequences of "
            f"{text.sequence_length}, seed {text.seed})"
        )
    return lines


def _tiers(report: Report) -> str:
    rows = [
        f"| {row.tier} | {', '.join(group_roles(row.roles))} | {count(row.parameters)} "
        f"| {row.parameters_percent:.2f}% | {size(row.bytes)} |"
        for row in report.plan.tiers()
    ]
    return "\n".join(
        ["| tier | roles | parameters | share | size |", "|---|---|---|---|---|", *rows]
    )


def _fidelity(report: Report) -> list[str]:
    found = report.fidelity
    if found is None:
        return []
    return [
        "## How close it is to the native model",
        f"Measured with `quantkit compare` on {found.tokens} tokens ({found.sequences} sequences, "
        f"seed {found.seed}) of {found.text} that nothing was calibrated on. KL divergences are in "
        f"nats per token, to {found.native}.",
        _fidelity_table(found),
    ]


def _fidelity_table(found: Fidelity) -> str:
    rows = [("KL divergence, mean", found.kl_mean)]
    rows += [(f"of it on {kind}", kl) for kind, kl in found.kl_by_text.items()]
    rows += [
        ("KL divergence, median", found.kl_median),
        ("KL divergence, 95th percentile", found.kl_p95),
        ("KL divergence, 99.9th percentile", found.kl_p999),
        ("top-1 agreement", found.top1_agreement),
        ("perplexity, over the native model's", found.perplexity_ratio),
    ]
    lines = [f"| {name} | {value.value:.4g} | {_ends(value)} |" for name, value in rows]
    return "\n".join(["| | measured | 95% interval |", "|---|---|---|", *lines])


def _ends(value: Interval) -> str:
    if value.low is None or value.high is None:
        return ""
    return f"{value.low:.4g} to {value.high:.4g}"


def _speed(report: Report) -> list[str]:
    speed = report.speed
    if speed is None:
        return []
    rows = [
        f"| {run.context} | {run.prefill_per_second:.1f} | {run.generated_per_second:.1f} "
        f"| {run.generated} | {size(run.peak_bytes)} |"
        for run in speed.runs
    ]
    versions = ", ".join(f"{name} {number}" for name, number in speed.versions.items())
    return [
        "## Speed and memory",
        f"Measured with `quantkit bench` on {speed.machine} ({versions}).",
        "\n".join(
            [
                "| prompt tokens | prefill, tokens/s | generation, tokens/s | generated | peak "
                "memory |",
                "|---|---|---|---|---|",
                *rows,
            ]
        ),
    ]


def _usage(report: Report) -> str:
    name = report.repo or f"path/to/{_title(report)}"
    return "\n".join(
        [
            "## Use",
            "",
            "```sh",
            "pip install mlx-lm",
            f'mlx_lm.generate --model {name} --prompt "Hello"',
            f"mlx_lm.chat --model {name}",
            f"mlx_lm.server --model {name}",
            "```",
            "",
            "```python",
            "from mlx_lm import generate, load",
            "",
            f'model, tokenizer = load("{name}")',
            'messages = [{"role": "user", "content": "Hello"}]',
            "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)",
            "print(generate(model, tokenizer, prompt=prompt))",
            "```",
        ]
    )


def _origin(report: Report) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    known = f"Hashes and the tier of every weight are in `quantkit.json`. Versions: {versions}."
    if report.command is None:
        return [known]
    return ["## How it was made", f"```sh\n{report.command}\n```", known]
