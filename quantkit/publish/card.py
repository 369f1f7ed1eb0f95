"""The model card, README.md of a repo. All of its numbers are in `quantkit.json`, too."""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from quantkit.artifacts.fidelity import Fidelity, Interval
from quantkit.artifacts.plan import Plan
from quantkit.artifacts.report import License, Report
from quantkit.artifacts.roles import group_roles
from quantkit.artifacts.scores import Score
from quantkit.formats.tiers import required_mlx
from quantkit.publish.pictures import FRONTIER_PICTURE, SCORES_PICTURE, TIERS_PICTURE
from quantkit.units import count, gib, size

CARD_FILE = "README.md"


def card(report: Report, pictures: Sequence[str] = ()) -> str:
    """Return the card: tiers, measurements, usage, and origin. Unmeasured values are left out.

    `pictures` are the files beside the card that it shows.
    """
    plan = report.plan
    title = _title(report)
    active = plan.active_bytes
    facts = [
        f"- Size: {size(report.total_bytes)} ({gib(report.total_bytes)})",
        f"- Bits per weight, everything stored counted: {plan.bits_per_weight:.3f}{_over(plan)}",
        *_experts(plan),
        *([] if active is None else [f"- Read per generated token: {size(active)}"]),
        *_memory(report),
        *_origin_of_tiers(report),
    ]
    sections = [
        _front(report),
        f"# {title}, {plan.bits_per_weight:.2f} bits per weight",
        f"A mixed-precision MLX quant of {_linked(report)}, made with quantkit "
        f"{report.versions['quantkit']} ({_plain(plan.origin)}).",
        "\n".join(facts),
        _tiers(report),
        *_removed(plan),
        *_picture(TIERS_PICTURE, "Bits per weight by role and layer", pictures),
        *_picture(FRONTIER_PICTURE, "KL divergence against size", pictures),
        *_fidelity(report),
        *_scores(report),
        *_picture(SCORES_PICTURE, "Accuracy on benchmarks", pictures),
        *_speed(report),
        _usage(report),
        *_origin(report),
    ]
    return "\n\n".join(sections) + "\n"


def license_of(folder: Path) -> License | None:
    """Return the licence in the front matter of the source's card."""
    from huggingface_hub import metadata_load

    try:
        stated = metadata_load(folder / CARD_FILE) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return None
    texts = {
        name: value if isinstance(value := stated.get(name), str) else None
        for name in ("license", "license_name", "license_link")
    }
    if not texts["license"]:
        return None
    return License(texts["license"], texts["license_name"], texts["license_link"])


def _picture(name: str, title: str, pictures: Sequence[str]) -> list[str]:
    return [f"![{title}]({name})"] if name in pictures else []


def _front(report: Report) -> str:
    front: dict[str, object] = {"library_name": "mlx", "pipeline_tag": "text-generation"}
    if licence := report.license:
        fields = {
            "license": licence.id,
            "license_name": licence.name,
            "license_link": licence.link,
        }
        front |= {name: value for name, value in fields.items() if value is not None}
    if report.base_model:
        front |= {"base_model": report.base_model, "base_model_relation": "quantized"}
    front["tags"] = ["mlx", "quantkit", report.plan.model_type]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---"


def _title(report: Report) -> str:
    return _plain((report.base_model or report.plan.source.name).rpartition("/")[2])


def _linked(report: Report) -> str:
    base = report.base_model
    return f"[{_plain(base)}](https://huggingface.co/{base})" if base else _title(report)


def _plain(text: str) -> str:
    """Escape foreign text, so that Markdown shows it verbatim on one line."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _over(plan: Plan) -> str:
    """Return over which parameters bits are counted, if some were removed."""
    return f" over the source's {count(plan.parameters)} parameters" if plan.pruning else ""


def _experts(plan: Plan) -> list[str]:
    """Return a line on the experts that were removed."""
    pruning = plan.pruning
    if pruning is None:
        return []
    cost = "" if pruning.kl is None else f"; {pruning.kl:.4g} of the predicted KL divergence"
    return [
        f"- Experts: {pruning.count} of {pruning.experts} kept in every layer, "
        f"{count(plan.kept_parameters)} parameters in all{cost}"
    ]


def _removed(plan: Plan) -> list[str]:
    """Return the list of the experts that were removed."""
    pruning = plan.pruning
    if pruning is None:
        return []
    rows = [
        f"| `{block}` | {', '.join(map(str, pruning.removed(block)))} |" for block in pruning.kept
    ]
    table = "\n".join(["| block | removed experts, numbered from 0 |", "|---|---|", *rows])
    return [f"<details><summary>Removed experts</summary>\n\n{table}\n\n</details>"]


def _memory(report: Report) -> list[str]:
    memory = report.memory
    if memory is None:
        return []
    fits = f"computed to fit Macs with {memory.smallest_mac_gib} GB of memory or more"
    if memory.smallest_mac_gib is None:
        fits = "more than any Mac has"
    return [
        f"- Memory: {size(memory.needed_bytes)} for the weights, {memory.context} tokens of KV "
        f"cache ({size(memory.cache_bytes)}) and {size(memory.reserve_bytes)} in reserve; {fits}"
    ]


def _origin_of_tiers(report: Report) -> list[str]:
    """Return lines on the choice of tiers, the quantizer and its text."""
    plan, lines = report.plan, []
    if plan.predicted_kl is not None:
        how = f", {plan.prediction_caveat}" if plan.prediction_caveat else ""
        lines.append(
            f"- Predicted KL divergence to the native model, nats per token{how}: "
            f"{plan.predicted_kl:.4g}"
        )
    if plan.measured_kl is not None:
        lines.append(f"- Measured on calibration text, to nearest: {plan.measured_kl:.4g}")
    tuned = f", then {plan.tuning_steps} steps of scale tuning" if plan.tuning_steps else ""
    lines.append(f"- Quantizer: {plan.quantizer}{tuned}")
    for text in plan.calibration_texts:
        done = "Validated" if text.split == "validate" else "Calibrated"
        documents = f", {text.documents} documents, seed {text.seed}" if text.documents else ""
        lines.append(
            f"- {done} on {text.tokens} tokens of {_plain(text.name)} ({text.sequences} "
            f"sequences of {text.sequence_length}{documents})"
        )
    if report.inputs_per_expert is not None:
        lines.append(f"- Inputs for the quantizer: {report.inputs_per_expert}")
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
    fidelity = report.fidelity
    if fidelity is None:
        return []
    return [
        "## How close it is to the native model",
        f"Measured with `quantkit compare` on {fidelity.tokens} tokens ({fidelity.documents} "
        f"documents, seed {fidelity.seed}) of {_plain(fidelity.text)} that calibrated nothing. KL "
        f"divergences are in nats per token, to {_plain(fidelity.native)}.",
        _fidelity_table(fidelity),
    ]


def _fidelity_table(fidelity: Fidelity) -> str:
    rows = [("KL divergence, mean", fidelity.kl_mean)]
    rows += [(f"KL divergence, mean on {kind}", kl) for kind, kl in fidelity.kl_by_text.items()]
    rows += [
        ("KL divergence, median", fidelity.kl_median),
        ("KL divergence, 95th percentile", fidelity.kl_p95),
        ("KL divergence, 99.9th percentile", fidelity.kl_p999),
        ("top-1 agreement", fidelity.top1_agreement),
        ("perplexity, over the native model's", fidelity.perplexity_ratio),
    ]
    lines = [f"| {name} | {value.value:.4g} | {_ends(value)} |" for name, value in rows]
    return "\n".join(["| | measured | 95% interval |", "|---|---|---|", *lines])


def _ends(value: Interval) -> str:
    if value.low is None or value.high is None:
        return ""
    return f"{value.low:.4g} to {value.high:.4g}"


def _scores(report: Report) -> list[str]:
    """Return the table of benchmarks, with the difference to another model where it is measured."""
    if not report.scores:
        return []
    commands = dict.fromkeys(score.command for score in report.scores if score.command)
    return [
        "## Benchmarks",
        "The final channel alone is scored; an answer without one, or cut off, is wrong. Intervals "
        "are 95%: Wilson's for accuracies, a bootstrap over the same items for differences.",
        "\n".join(
            [
                "| | items | accuracy | other model | difference |",
                "|---|---|---|---|---|",
                *(_score_row(score) for score in report.scores),
            ]
        ),
        *(f"```sh\n{command}\n```" for command in commands),
    ]


def _score_row(score: Score) -> str:
    limit = "" if score.whole else ", a sample"
    other, change = "", ""
    if (against := score.against) is not None:
        other = f"{_plain(against.other)}: {100 * against.accuracy:.1f}%"
        change = against.difference.percents()
    return (
        f"| {_plain(score.title)} | {score.items}{limit} | {score.accuracy.percents()} | {other} "
        f"| {change} |"
    )


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
    name = report.repo or "path/to/this/folder"
    least = required_mlx(assignment.storage for assignment in report.plan.assignments)
    needed = f' "mlx>={least}"' if least else ""
    return "\n".join(
        [
            "## Use",
            "",
            "```sh",
            f"pip install mlx-lm{needed}",
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
    details = f"Hashes and the tier of every weight are in `quantkit.json`. Versions: {versions}."
    if report.command is None:
        return [details]
    return ["## How it was made", f"```sh\n{report.command}\n```", details]
