"""The repo's config.json: the source's own, edited as raw JSON, and the files that go along."""

from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from quantkit.artifacts import Inventory, Plan
from quantkit.formats.tiers import Tier, parse_tier, resolve

_COMPANIONS = (
    *("*.json", "*.jinja", "*.txt", "*.jsonl", "*.model", "*.tiktoken", "*.py"),
    *("LICENSE*", "NOTICE*", "USAGE_POLICY*"),
)
_NOT_COPIED = ("config.json", "*.index.json", "quantkit.json", "hf_quant_config.json", ".*")


def edit_config(config: Mapping[str, Any], inventory: Inventory, plan: Plan) -> dict[str, Any]:
    """`config` with mlx-lm's `quantization` (and its copy `quantization_config`) for `plan`.

    Every quantized module has an entry of its own, since not every mlx-lm infers missing ones; the
    top level, required, repeats the tier that holds most weights.
    """
    edited = {key: value for key, value in config.items() if key != "quantization_config"}
    restore_rope(edited)
    tiers = _quantized(inventory, plan)
    if tiers:
        held: Counter[Tier] = Counter()
        for weight in inventory.weights:
            if weight.name in tiers:
                held[tiers[weight.name]] += weight.parameters
        top = max(held, key=lambda tier: (held[tier], tier.name))
        entries = {name: tier.config_entry() for name, tier in tiers.items()}
        edited["quantization"] = {**top.config_entry(), **entries}
        edited["quantization_config"] = edited["quantization"]
    return edited


def _quantized(inventory: Inventory, plan: Plan) -> dict[str, Tier]:
    tiers = {}
    for weight, choice in zip(inventory.weights, plan.choices, strict=True):
        tier = resolve(parse_tier(choice.tier), parse_tier(weight.storage))
        if tier.quantized:
            tiers[weight.name] = tier
    return tiers


def restore_rope(config: dict[str, Any]) -> None:
    """Give back `rope_theta` and `rope_scaling`, which transformers 5 folds into
    `rope_parameters`: mlx-lm models that do not read the new key would silently lose YaRN."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return
    config.setdefault("rope_theta", rope["rope_theta"])
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    if scaling.get("rope_type", "default") != "default":
        config.setdefault("rope_scaling", scaling)


def companions(folder: Path) -> list[Path]:
    """Files of the source that belong in the repo: tokenizer, templates, generation, licence."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and any(fnmatchcase(path.name, pattern) for pattern in _COMPANIONS)
        and not any(fnmatchcase(path.name, pattern) for pattern in _NOT_COPIED)
    )
