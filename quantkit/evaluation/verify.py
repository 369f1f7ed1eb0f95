"""Verify that a repo agrees with its plan, and that stock mlx-lm loads it."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.artifacts.experts import expert_blocks
from quantkit.artifacts.plan import Assignment
from quantkit.artifacts.report import Report
from quantkit.backend import mx, on_cpu
from quantkit.calibration.chat_template import has_chat_template, render_chat
from quantkit.checkpoint.checkpoint import INDEX_FILE, Checkpoint, open_folder
from quantkit.checkpoint.generic import build_model
from quantkit.checkpoint.headers import StoredTensor
from quantkit.checkpoint.model_config import mlx_quantization
from quantkit.checkpoint.source import open_source
from quantkit.checkpoint.stock import load_stock
from quantkit.errors import InputError, OutputError, SourceError, first_line
from quantkit.formats.dtypes import FLOATS, nan_scales, nonfinite
from quantkit.formats.tiers import TIERS, Tier
from quantkit.progress import Stage
from quantkit.storage.hashing import hash_file
from quantkit.storage.json_files import load_json
from quantkit.storage.paths import REPORT_FILE
from quantkit.streaming.attention import attention_differences, compared_layers
from quantkit.units import like_others, plural

_BLOCK = 1 << 22  # elements looked at in one go
_TOP_LEVEL = ("group_size", "bits", "mode")
_SKIPPED = "skipped, since a check failed"


@dataclass(frozen=True)
class Check:
    """The result of one check: `ok` is None if it was skipped."""

    name: str
    ok: bool | None
    detail: str


class _WrongError(Exception):
    """A check failed."""


def verify(
    repo: Path,
    report: Report,
    *,
    load: bool = True,
    trust_remote_code: bool = False,
    progress: Stage | None = None,
) -> Iterator[Check]:
    """Check `repo` against its `report` and mlx-lm, cheapest check first.

    `load` loads it with stock mlx-lm and generates a few tokens; `trust_remote_code` lets its
    tokenizer run Python code of the repo. `progress` receives the bytes hashed.
    """
    try:
        checkpoint = open_folder(repo)
    except SourceError as exc:
        yield Check("index and shards", False, str(exc))
        return
    good = True
    for check in _check_files(repo, checkpoint, report, progress):
        good = good and check.ok is True
        yield check
    checkpoint.close()
    check = Check("attention as the source's", None, _SKIPPED)
    if good:  # a foreign config may describe a model of any size
        check = _check(check.name, lambda: _check_attention(repo, report))
        good = check.ok is True
    yield check
    if load and good:
        yield from _check_mlx_lm(repo, trust_remote_code)
    else:
        reason = _SKIPPED if load else "not loaded, as requested"
        yield Check("stock mlx-lm loads it", None, reason)


def _check_files(
    repo: Path, checkpoint: Checkpoint, report: Report, progress: Stage | None
) -> Iterator[Check]:
    looks = {
        "index and shards": lambda: _check_index(repo, checkpoint),
        "config": lambda: _check_config(checkpoint),
        "bytes as planned": lambda: _check_bytes(checkpoint, report),
        "experts as planned": lambda: _check_experts(repo, report),
        "hashes": lambda: _check_hashes(repo, report, progress),
        "finite values": lambda: _check_finite(checkpoint),
    }
    if report.plan.pruning is None:
        del looks["experts as planned"]
    for name, look in looks.items():
        yield _check(name, look)


def _check(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except (_WrongError, SourceError) as exc:
        return Check(name, False, str(exc))


def _check_index(repo: Path, checkpoint: Checkpoint) -> str:
    indexed = {file.name for file in checkpoint.files}
    # mlx-lm loads every model*.safetensors in the folder, even without the index.
    if stray := {path.name for path in repo.glob("model*.safetensors")} - indexed:
        raise _WrongError(f"{min(stray)} is not in the index, but mlx-lm would load it. Remove it.")
    stored = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    if not (repo / INDEX_FILE).is_file():
        raise _WrongError(f"{INDEX_FILE} is missing.")
    metadata = load_json(repo / INDEX_FILE, SourceError).get("metadata")
    claimed = metadata.get("total_size") if isinstance(metadata, dict) else None
    if claimed != stored:
        raise _WrongError(f"{INDEX_FILE}: total_size {claimed}, the shards hold {stored} bytes.")
    return f"{plural(len(checkpoint.tensors), 'tensor')} in {plural(len(indexed), 'shard')}"


def _check_config(checkpoint: Checkpoint) -> str:
    config = checkpoint.config
    quantization = _quantization(checkpoint)
    if (config.get("quantization_config") or quantization) != quantization:
        raise _WrongError("config.json: quantization_config differs from quantization.")
    scaled = {name[: -len(".scales")] for name in checkpoint.tensors if name.endswith(".scales")}
    entries = {key: value for key, value in quantization.items() if key not in _TOP_LEVEL}
    if scaled and not all(key in quantization for key in _TOP_LEVEL):
        raise _WrongError(f"config.json: quantization lacks one of {', '.join(_TOP_LEVEL)}.")
    for names, fault in (
        (scaled - entries.keys(), "has scales, but no entry in config.json's quantization"),
        (entries.keys() - scaled, "is in config.json's quantization, but has no scales"),
    ):
        if names:
            raise _WrongError(f"{min(names)} {fault}{like_others(len(names))}.")
    for name, entry in entries.items():
        _check_module(name, _tier_of(name, entry), checkpoint.tensors)
    return f"{len(entries)} quantized modules"


def _check_attention(repo: Path, report: Report) -> str:
    """Compare mlx-lm's model for the repo's config to the source's own config."""
    model = build_model(load_json(repo / "config.json", SourceError))
    if actual := attention_differences(report.source_config, model):
        raise _WrongError(f"{actual[0]} ({len(actual)} differences).")
    compared, layers = compared_layers(report.source_config, model)
    return f"as mlx-lm builds it, RoPE of {compared} of {layers} layers compared"


def _quantization(checkpoint: Checkpoint) -> dict[str, Any]:
    return dict(mlx_quantization(checkpoint.config) or {})


def _tier_of(name: str, entry: Any) -> Tier:
    for tier in TIERS.values():
        if tier.quantized and entry == tier.config_entry():
            return tier
    raise _WrongError(f"config.json: {name}: {entry} is not a tier of mlx, or lacks its mode.")


def _check_module(name: str, tier: Tier, tensors: Mapping[str, StoredTensor]) -> None:
    scales, packed = tensors[f"{name}.scales"], tensors.get(f"{name}.weight")
    if packed is None:
        raise _WrongError(f"{name}: has scales, but no weight.")
    shape = (*scales.shape[:-1], scales.shape[-1] * tier.group_size)
    dtype = scales.dtype if tier.mode == "affine" else "BF16"
    for spec in tier.tensors(name, shape, dtype):
        actual = tensors.get(spec.name)
        if actual is None:
            raise _WrongError(f"{spec.name} is missing; tier {tier} needs it.")
        if (actual.dtype, actual.shape) != (spec.dtype, spec.shape):
            raise _WrongError(
                f"{spec.name} is {actual.dtype} {list(actual.shape)}; tier {tier} needs "
                f"{spec.dtype} {list(spec.shape)}."
            )
    if tier.mode != "affine" and f"{name}.biases" in tensors:
        raise _WrongError(f"{name}.biases exists; tier {tier} has no biases.")


def _check_bytes(checkpoint: Checkpoint, report: Report) -> str:
    plan = report.plan
    remaining = {name: tensor.nbytes for name, tensor in checkpoint.tensors.items()}
    for assignment in plan.assignments:
        if assignment.storage not in TIERS:
            raise _WrongError(
                f"{assignment.name}: quantkit.json names no tier {assignment.storage!r}."
            )
        if (count := _parameters(checkpoint.tensors, assignment)) != assignment.parameters:
            raise _WrongError(
                f"{assignment.name} holds {count} weights, planned {assignment.parameters}."
            )
        actual = sum(
            remaining.pop(f"{assignment.name}.{suffix}", 0) for suffix in _suffixes(assignment)
        )
        if actual != assignment.bytes:
            raise _WrongError(
                f"{assignment.name} takes {actual} bytes, planned were {assignment.bytes}."
            )
    if (unquantized := sum(remaining.values())) != plan.unquantized.bytes:
        raise _WrongError(
            f"norms and biases take {unquantized} bytes, planned were {plan.unquantized.bytes}."
        )
    return f"{plan.total_bytes:,} bytes"


def _check_experts(repo: Path, report: Report) -> str:
    """Compare the experts of every block, and those in the config, to the plan's pruning."""
    plan, pruning = report.plan, report.plan.pruning
    assert pruning is not None
    stated = load_json(repo / REPORT_FILE, SourceError).get("plan")
    if not isinstance(stated, dict) or stated.get("tiers_sha256") != plan.tiers_sha256:
        raise _WrongError(f"{REPORT_FILE}: its tiers or its lists of experts were edited.")
    if pruning.source_parameters < plan.kept_parameters or pruning.count > pruning.experts:
        raise _WrongError(f"{REPORT_FILE}: keeps more than its source had.")
    inventory = open_source(str(repo), quantized=True).inventory
    if inventory.experts != pruning.count:
        raise _WrongError(
            f"config.json: {inventory.experts} experts, planned were {pruning.count}."
        )
    try:
        blocks = expert_blocks(inventory)
    except InputError as exc:
        raise _WrongError(str(exc)) from exc
    if wrong := blocks.keys() ^ pruning.kept.keys():
        raise _WrongError(f"{min(wrong)}: has experts in the repo or in the plan, but not in both.")
    return f"{pruning.count} of {pruning.experts} kept in {plural(len(blocks), 'block')}"


def _suffixes(assignment: Assignment) -> tuple[str, ...]:
    tier = TIERS[assignment.storage]
    if not tier.quantized:
        return ("weight",)
    return ("weight", "scales", "biases") if tier.mode == "affine" else ("weight", "scales")


def _parameters(tensors: Mapping[str, StoredTensor], assignment: Assignment) -> int:
    tier = TIERS[assignment.storage]
    tensor = tensors.get(f"{assignment.name}.{'scales' if tier.quantized else 'weight'}")
    return math.prod(tensor.shape) * max(1, tier.group_size) if tensor else 0


def _check_hashes(repo: Path, report: Report, progress: Stage | None) -> str:
    """Check the shards and all other files that mlx-lm reads; the card may be edited."""
    shards = {path.name for path in repo.glob("model*.safetensors")}
    if unknown := shards ^ {shard.name for shard in report.shards}:
        raise _WrongError(f"{min(unknown)}: in the folder or in quantkit.json, but not in both.")
    for name, sha256 in report.sha256s.items():
        actual = hash_file(repo / name, name, progress)
        if actual != sha256:
            raise _WrongError(f"{name}: sha256 {actual}, written was {sha256}.")
    return f"{len(report.sha256s)} files"


def _check_finite(checkpoint: Checkpoint) -> str:
    looked = 0
    for tensor in checkpoint.tensors.values():
        scales = tensor.name.endswith(".scales")
        if tensor.dtype not in FLOATS and not scales:
            continue
        size = math.prod(tensor.shape)
        bad = sum(
            _bad_values(checkpoint, tensor, start, min(start + _BLOCK, size))
            for start in range(0, size, _BLOCK)
        )
        if bad:
            raise _WrongError(f"{tensor.name}: {bad} of {size} values are NaN or infinite.")
        looked += size
    return f"{looked:,} values"


def _bad_values(checkpoint: Checkpoint, tensor: StoredTensor, start: int, stop: int) -> int:
    values = checkpoint.read(tensor, start, stop)
    if tensor.dtype in FLOATS:
        return nonfinite(values, tensor.dtype)
    entry = _quantization(checkpoint).get(tensor.name.removesuffix(".scales"))
    return nan_scales(values, str(entry.get("mode")) if isinstance(entry, dict) else "")


def _check_mlx_lm(repo: Path, trust_remote_code: bool) -> Iterator[Check]:
    import mlx_lm

    name = "stock mlx-lm loads it"
    try:
        model, tokenizer = load_stock(str(repo), trust_remote_code=trust_remote_code)
    except OutputError as exc:
        yield Check(name, False, str(exc))
        return
    yield Check(name, True, f"mlx-lm {mlx_lm.__version__}, strict")
    try:
        prompt = _prompt(tokenizer)
        produced = list(mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=4))
        finite = not any(mx.any(mx.isnan(step.logprobs)).item() for step in produced)
    except InputError as exc:
        yield Check("generates", False, f"{exc}.")
        return
    except Exception as exc:  # noqa: BLE001  (mlx-lm raises anything)
        if on_cpu() and "GatherMM" in str(exc):
            yield Check("generates", None, "skipped: on a CPU mlx runs experts in float32 only")
        else:
            yield Check("generates", False, f"{type(exc).__name__}: {first_line(exc)}")
        return
    detail = f"{len(produced)} tokens" if finite else "log-probabilities are NaN"
    yield Check("generates", finite and bool(produced), detail)


def _prompt(tokenizer: Any) -> list[int]:
    """Return a short chat by the repo's template, or a word. Raises InputError."""
    if not has_chat_template(tokenizer):
        return tokenizer.encode("The") or [0]
    messages = [{"role": "user", "content": "Hello"}]
    text = render_chat(tokenizer, messages, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False) or [0]
