"""The config.json of a repo, edited from the source's raw JSON, and the companion files."""

import os
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from quantkit.artifacts.inventory import Inventory
from quantkit.artifacts.plan import Plan
from quantkit.checkpoint.checkpoint import CHAT_TEMPLATES
from quantkit.checkpoint.model_config import with_dtype
from quantkit.errors import SourceError
from quantkit.formats.tiers import Tier, parse_tier
from quantkit.writer.modalities import absent_modalities, settings_without_tensors

_COMPANIONS = (
    *("*.json", "*.jinja", "*.txt", "*.jsonl", "*.model", "*.tiktoken", "*.py"),
    *("LICENSE*", "NOTICE*", "USAGE_POLICY*"),
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_NOT_COPIED = (
    "config.json",
    "*.index.json",
    "*.index.*.json",
    "quantkit.json",
    "hf_quant_config.json",
    ".*",
)
_PROCESSORS = ("*processor*.json", "*processing_*.py")


def edit_config(config: Mapping[str, Any], inventory: Inventory, plan: Plan) -> dict[str, Any]:
    """Return `config` with mlx-lm's `quantization` (and its copy `quantization_config`).

    Every quantized module has an entry, since not every mlx-lm infers missing ones. The required
    top level repeats the tier with the most parameters.
    """
    left_out = {"quantization", "quantization_config", "_name_or_path"}  # the last: a user's path
    dtypes: Counter[str] = Counter(weight.dtype for weight in inventory.weights)
    edited = with_dtype(config, dtypes.most_common(1)[0][0]) if dtypes else dict(config)
    left_out.update(settings_without_tensors(config, inventory))
    edited = {key: value for key, value in edited.items() if key not in left_out}
    tiers = _quantized(inventory, plan)
    if tiers:
        parameters: Counter[Tier] = Counter()
        for weight in inventory.weights:
            if weight.name in tiers:
                parameters[tiers[weight.name]] += weight.parameters
        top = max(parameters, key=lambda tier: (parameters[tier], tier.name))
        entries = {name: tier.config_entry() for name, tier in tiers.items()}
        edited["quantization"] = {**top.config_entry(), **entries}
        edited["quantization_config"] = edited["quantization"]
    return edited


def _quantized(inventory: Inventory, plan: Plan) -> dict[str, Tier]:
    tiers = {}
    for weight, assignment in zip(inventory.weights, plan.assignments, strict=True):
        tier = parse_tier(assignment.storage)
        if tier.quantized:
            tiers[weight.name] = tier
    return tiers


def companions(folder: Path, inventory: Inventory) -> list[str]:
    """Return the names of the source's files that belong in the repo.

    These are tokenizer, chat templates, generation settings and licence; image and audio processors
    only if the repo has such encoders. Raises SourceError for a broken link or a missing tokenizer.
    """
    not_copied = (*_NOT_COPIED, *(_PROCESSORS if len(absent_modalities(inventory)) == 2 else ()))
    paths = sorted(
        path
        for path in folder.iterdir()
        if any(fnmatchcase(path.name, pattern) for pattern in _COMPANIONS)
        and not any(fnmatchcase(path.name, pattern) for pattern in not_copied)
        and not path.is_dir()
    )
    paths += sorted(folder.glob(CHAT_TEMPLATES))
    for path in paths:
        if not path.is_file():
            raise SourceError(f"{path.name}: a broken link, or not a plain file, in {folder}.")
        if not os.access(path, os.R_OK):
            raise SourceError(f"{path.name}: may not be read. Check its permissions in {folder}.")
    if not {path.name for path in paths}.intersection(_TOKENIZERS) and not any(
        path.suffix == ".tiktoken" for path in paths
    ):
        raise SourceError(
            f"{folder}: has no tokenizer ({', '.join(_TOKENIZERS)}), which mlx-lm needs to load "
            "a model. Copy it from the base model."
        )
    return [path.relative_to(folder).as_posix() for path in paths]
