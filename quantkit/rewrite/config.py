"""The repo's config.json: the source's own, edited as raw JSON, and the files that go along."""

import os
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from quantkit.artifacts.inventory import Inventory
from quantkit.artifacts.plan import Plan
from quantkit.errors import SourceError
from quantkit.formats.tiers import Tier, parse_tier
from quantkit.source.model_config import with_dtype

_COMPANIONS = (
    *("*.json", "*.jinja", "*.txt", "*.jsonl", "*.model", "*.tiktoken", "*.py"),
    *("LICENSE*", "NOTICE*", "USAGE_POLICY*"),
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_NOT_COPIED = ("config.json", "*.index.json", "quantkit.json", "hf_quant_config.json", ".*")


def edit_config(config: Mapping[str, Any], inventory: Inventory, plan: Plan) -> dict[str, Any]:
    """`config` with mlx-lm's `quantization` (and its copy `quantization_config`) for `plan`.

    Every quantized module has an entry of its own, since not every mlx-lm infers missing ones; the
    top level, required, repeats the tier that holds most weights.
    """
    left_out = ("quantization", "quantization_config", "_name_or_path")  # the last: a user's path
    held_in: Counter[str] = Counter(weight.dtype for weight in inventory.weights)
    edited = with_dtype(config, held_in.most_common(1)[0][0]) if held_in else dict(config)
    edited = {key: value for key, value in edited.items() if key not in left_out}
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
        tier = parse_tier(choice.storage)
        if tier.quantized:
            tiers[weight.name] = tier
    return tiers


def companions(folder: Path) -> list[Path]:
    """Files of the source that belong in the repo: tokenizer, templates, generation, licence.

    Raises SourceError when one is a broken link, or there is no tokenizer: mlx-lm would load
    neither.
    """
    found = sorted(
        path
        for path in folder.iterdir()
        if any(fnmatchcase(path.name, pattern) for pattern in _COMPANIONS)
        and not any(fnmatchcase(path.name, pattern) for pattern in _NOT_COPIED)
        and not path.is_dir()
    )
    for path in found:
        if not path.is_file():
            raise SourceError(f"{path.name}: a broken link, or no plain file, in {folder}.")
        if not os.access(path, os.R_OK):
            raise SourceError(f"{path.name}: may not be read. Check its permissions in {folder}.")
    if not {path.name for path in found}.intersection(_TOKENIZERS) and not any(
        path.suffix == ".tiktoken" for path in found
    ):
        raise SourceError(
            f"{folder}: holds no tokenizer ({', '.join(_TOKENIZERS)}), without which mlx-lm does "
            "not load a model. Copy it from the base model."
        )
    return found
