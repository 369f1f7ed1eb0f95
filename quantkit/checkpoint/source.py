"""A source: a checkpoint, its inventory, and the values behind every mlx-lm tensor name."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from quantkit.artifacts.inventory import Inventory, Weight
from quantkit.checkpoint import gpt_oss, hub
from quantkit.checkpoint.checkpoint import Checkpoint, hash_file, open_folder
from quantkit.checkpoint.model_config import DTYPES, mlx_quantization, stated_dtype
from quantkit.checkpoint.tensor_map import Layout, cast_floats, experts_of, optional_int, text_scope
from quantkit.checkpoint.views import View
from quantkit.errors import DamagedError, HubUnreachableError, SourceError
from quantkit.formats.dtypes import numpy_dtype
from quantkit.progress import Progress
from quantkit.storage.paths import user_path

STATED, STORED = "stated", "stored"
_BLOCK_BYTES = 2_000_000  # larger ones cost more in page faults than they save in calls


@dataclass(frozen=True)
class Source:
    """What later stages read: the inventory, and the rows of any tensor it lists.

    `floats` says which float type its tensors have: see `open_source`.
    """

    checkpoint: Checkpoint
    inventory: Inventory
    views: Mapping[str, View]
    floats: str

    def blocks(self, name: str) -> Iterator[tuple[int, int]]:
        """Row ranges that cover tensor `name`, each of about 2 MB as stored."""
        view = self.views[name]
        step_bytes = max(1, view.step * view.width * numpy_dtype(view.dtype).itemsize)
        rows = max(1, _BLOCK_BYTES // step_bytes) * view.step
        for start in range(0, view.rows, rows):
            yield start, min(start + rows, view.rows)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a tensor, as its numpy carrier (rows, width)."""
        return self.views[name].read(self.checkpoint, start, stop)

    @cached_property
    def weights(self) -> Mapping[str, Weight]:
        """The weights by their names."""
        return {weight.name: weight for weight in self.inventory.weights}

    def dtype(self, name: str) -> str:
        """The element type of a tensor as `read` carries it."""
        return self.views[name].dtype


def open_source(
    name: str,
    revision: str | None = None,
    *,
    quantized: bool = False,
    floats: str = STATED,
    trust_remote_code: bool = False,
) -> Source:
    """Open a local folder or a Hub id, from headers alone; with `quantized` also a repo that mlx
    has quantized, to be looked at.

    `floats` is the float type of unquantized tensors, scales and biases: bfloat16, float16 or
    float32; `stated` for the one that config.json states, or else most values have; `stored` leaves
    every tensor as it is. `trust_remote_code` allows the tokenizer to run code of its own. Raises
    SourceError or HubError.
    """
    if floats not in (STATED, STORED, *DTYPES):
        raise SourceError(f"there is no dtype {floats!r}. Types: {', '.join(DTYPES)}.")
    opened = _open(name, revision)
    if trust_remote_code:
        opened = replace(opened, trust_remote_code=True)
    return _source(opened, quantized, floats)


def _open(name: str, revision: str | None) -> Checkpoint:
    folder = user_path(name)
    try:
        there = folder.exists()
    except (OSError, ValueError) as exc:
        raise SourceError(f"{name[:80]}: not a path ({exc}).") from exc
    if there:
        return open_folder(folder)
    if not hub.is_repo_id(name):
        raise SourceError(f"{name}: no such folder, and not a Hub id (user/name).")
    try:
        return hub.open_hub(name, revision)
    except HubUnreachableError:
        if (cached := hub.open_cached(name, revision)) is None:
            raise
        return cached


def with_values(source: Source) -> Source:
    """`source` with its files at hand: a Hub repo known by metadata only is downloaded."""
    checkpoint = source.checkpoint
    if checkpoint.folder is not None:
        return source
    folder = hub.download(checkpoint)
    opened = open_folder(folder, checkpoint.name, checkpoint.revision)
    opened = replace(opened, trust_remote_code=checkpoint.trust_remote_code)
    return _source(opened, mlx_quantization(checkpoint.config) is not None, source.floats)


def file_hashes(source: Source, progress: Progress | None = None) -> dict[str, str]:
    """sha256 of every shard, computed. Raises DamagedError where the Hub publishes another."""
    hashes = {}
    for file in source.checkpoint.files:
        found = hash_file(source.checkpoint.path(file.name), file.name, progress)
        if file.sha256 not in (None, found):
            raise DamagedError(
                f"{file.name}: sha256 is {found}, published was {file.sha256}. Download it again."
            )
        hashes[file.name] = found
    return hashes


def _source(checkpoint: Checkpoint, quantized: bool, floats: str) -> Source:
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise SourceError("config.json: has no model_type.")
    if not (quantized and mlx_quantization(checkpoint.config)):
        _require_unquantized(checkpoint)
    layout = _describe(checkpoint)
    if floats != STORED and not quantized:
        cast_floats(layout, DTYPES.get(floats) or stated_dtype(checkpoint.config))
    experts, per_token = experts_of(checkpoint.config)
    inventory = Inventory(
        source=checkpoint.id,
        model_type=str(checkpoint.config["model_type"]),
        layers=layout.layers,
        experts=experts,
        experts_per_token=per_token,
        weights=tuple(layout.weights),
        kept=tuple(layout.kept),
    )
    return Source(checkpoint, inventory, layout.views, floats)


def _describe(checkpoint: Checkpoint) -> Layout:
    model_type = checkpoint.config["model_type"]
    layers = optional_int(checkpoint.config, "num_hidden_layers", "n_layer", "n_layers")
    if layers is not None and layers > len(checkpoint.tensors):
        raise SourceError(
            f"config.json: {layers} layers, but the shards hold {len(checkpoint.tensors)} tensors."
        )
    quantized = mlx_quantization(checkpoint.config) is not None
    if model_type == gpt_oss.MODEL_TYPE and (not quantized or gpt_oss.is_native(checkpoint)):
        return gpt_oss.describe(checkpoint)
    from quantkit.checkpoint import generic  # imports mlx and mlx-lm

    return generic.describe(checkpoint)


def _require_unquantized(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    is_gpt_oss = config.get("model_type") == gpt_oss.MODEL_TYPE
    if mlx_quantization(config) is not None:
        if is_gpt_oss and gpt_oss.is_native(checkpoint):
            return
        raise SourceError(
            f"{checkpoint.name}: already quantized by mlx. Start from the published checkpoint "
            "(quantkit report shows what a quant holds)."
        )
    declared = config.get("quantization_config") or text_scope(config).get("quantization_config")
    if declared is not None and not isinstance(declared, dict):
        raise SourceError("config.json: quantization_config is no object.")
    method = (declared or {}).get("quant_method")
    if method and not (method == "mxfp4" and is_gpt_oss):
        raise SourceError(
            f"{checkpoint.name}: already quantized ({method}). Start from its BF16 checkpoint."
        )
