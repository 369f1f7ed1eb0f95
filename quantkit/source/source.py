"""A source: a checkpoint, its inventory, and the values behind every mlx-lm tensor name."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from quantkit.artifacts.inventory import Inventory, Weight
from quantkit.errors import DamagedError, HubUnreachableError, SourceError
from quantkit.formats.dtypes import numpy_dtype
from quantkit.places import user_path
from quantkit.progress import Progress
from quantkit.source import gpt_oss, hub
from quantkit.source.checkpoint import Checkpoint, hash_file, open_folder
from quantkit.source.layout import Layout, experts_of, optional_int
from quantkit.source.views import View

_BLOCK_BYTES = 2_000_000  # larger ones cost more in page faults than they save in calls


@dataclass(frozen=True)
class Source:
    """What later stages read: the inventory, and the rows of any tensor it lists."""

    checkpoint: Checkpoint
    inventory: Inventory
    views: Mapping[str, View]

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


def open_source(name: str, revision: str | None = None, *, quantized: bool = False) -> Source:
    """Open a local folder or a Hub id, from headers alone; with `quantized` also a repo that mlx
    has quantized, to be looked at.

    Raises SourceError or HubError.
    """
    folder = user_path(name)
    try:
        there = folder.exists()
    except (OSError, ValueError) as exc:
        raise SourceError(f"{name[:80]}: not a path ({exc}).") from exc
    if there:
        return _source(open_folder(folder), quantized)
    if not hub.is_repo_id(name):
        raise SourceError(f"{name}: no such folder, and not a Hub id (user/name).")
    try:
        return _source(hub.open_hub(name, revision), quantized)
    except HubUnreachableError:
        if (cached := hub.open_cached(name, revision)) is None:
            raise
        return _source(cached, quantized)


def with_values(source: Source) -> Source:
    """`source` with its files at hand: a Hub repo known by metadata only is downloaded."""
    checkpoint = source.checkpoint
    if checkpoint.folder is not None:
        return source
    folder = hub.download(checkpoint)
    quantized = "quantization" in checkpoint.config
    return _source(open_folder(folder, checkpoint.name, checkpoint.revision), quantized)


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


def _source(checkpoint: Checkpoint, quantized: bool) -> Source:
    if not (quantized and "quantization" in checkpoint.config):
        _require_unquantized(checkpoint)
    layout = _describe(checkpoint)
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
    return Source(checkpoint, inventory, layout.views)


def _describe(checkpoint: Checkpoint) -> Layout:
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise SourceError("config.json: has no model_type.")
    layers = optional_int(checkpoint.config, "num_hidden_layers", "n_layer", "n_layers")
    if layers is not None and layers > len(checkpoint.tensors):
        raise SourceError(
            f"config.json: {layers} layers, but the shards hold {len(checkpoint.tensors)} tensors."
        )
    if model_type == gpt_oss.MODEL_TYPE and "quantization" not in checkpoint.config:
        return gpt_oss.describe(checkpoint)
    from quantkit.source import generic  # imports mlx and mlx-lm

    return generic.describe(checkpoint)


def _require_unquantized(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    if "quantization" in config:
        raise SourceError(
            f"{checkpoint.name}: already quantized by mlx. Start from the published checkpoint "
            "(quantkit report shows what a quant holds)."
        )
    declared = config.get("quantization_config") or {}
    if not isinstance(declared, dict):
        raise SourceError("config.json: quantization_config is no object.")
    method = declared.get("quant_method")
    if method and not (method == "mxfp4" and config.get("model_type") == gpt_oss.MODEL_TYPE):
        raise SourceError(
            f"{checkpoint.name}: already quantized ({method}). Start from its BF16 checkpoint."
        )
