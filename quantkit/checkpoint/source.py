"""A source: a checkpoint, its inventory, and the values of every mlx-lm tensor."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from quantkit.artifacts.inventory import Inventory, Weight
from quantkit.checkpoint import gpt_oss, hub
from quantkit.checkpoint.checkpoint import Checkpoint, open_folder
from quantkit.checkpoint.model_config import DTYPES, mlx_quantization, stated_dtype, text_scope
from quantkit.checkpoint.tensor_map import Layout, cast_floats
from quantkit.checkpoint.views import View
from quantkit.errors import DamagedError, HubUnreachableError, SourceError
from quantkit.formats.dtypes import numpy_dtype
from quantkit.progress import Stage
from quantkit.storage.hash_cache import remembered_hash
from quantkit.storage.hashing import hash_file
from quantkit.storage.paths import user_path

STATED, STORED = "stated", "stored"
_BLOCK_BYTES = 2_000_000  # larger ones cost more in page faults than they save in calls


@dataclass(frozen=True)
class Source:
    """The input of all later stages: the inventory, and the rows of every tensor in it.

    `floats` is the float type of its tensors, see `open_source`. `whole` is the source before
    experts were removed, None if none were.
    """

    checkpoint: Checkpoint
    inventory: Inventory
    views: Mapping[str, View]
    floats: str
    whole: "Source | None" = None

    def blocks(self, name: str) -> Iterator[tuple[int, int]]:
        """Yield row ranges that cover tensor `name`, each of about 2 MB as stored."""
        view = self.views[name]
        step_bytes = max(1, view.step * view.width * numpy_dtype(view.dtype).itemsize)
        rows = max(1, _BLOCK_BYTES // step_bytes) * view.step
        for start in range(0, view.rows, rows):
            yield start, min(start + rows, view.rows)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read rows [start, stop) of a tensor, as its numpy carrier (rows, width)."""
        return self.views[name].read(self.checkpoint, start, stop)

    @cached_property
    def weights(self) -> Mapping[str, Weight]:
        """The weights by name."""
        return {weight.name: weight for weight in self.inventory.weights}

    def dtype(self, name: str) -> str:
        """Return the element type of a tensor as `read` carries it."""
        return self.views[name].dtype


def open_source(
    name: str,
    revision: str | None = None,
    *,
    quantized: bool = False,
    floats: str = STATED,
    trust_remote_code: bool = False,
) -> Source:
    """Open a local folder or a Hub id, from headers alone.

    `quantized` also accepts a repo that mlx has quantized. `floats` is the float type of
    unquantized tensors, scales and biases: bfloat16, float16, float32; `stated` for the type in
    config.json, or else of most values; `stored` to leave every tensor as it is.
    `trust_remote_code` lets the tokenizer run Python code of the repo. Raises SourceError or
    HubError.
    """
    if floats not in (STATED, STORED, *DTYPES):
        raise SourceError(f"unknown `dtype` {floats!r}. Use one of {', '.join(DTYPES)}.")
    opened = open_checkpoint(name, revision)
    if trust_remote_code:
        opened = replace(opened, trust_remote_code=True)
    return _source(opened, quantized, floats)


def open_checkpoint(name: str, revision: str | None = None) -> Checkpoint:
    """Open a folder, or a Hub id, which its cached copy replaces where the Hub is out of reach.

    Raises SourceError or HubError.
    """
    if not name.strip():
        raise SourceError("the name of the checkpoint is empty. Give a folder or a Hub id.")
    folder = user_path(name)
    try:
        exists = folder.exists()
    except (OSError, ValueError) as exc:
        raise SourceError(f"{name[:80]}: not a path ({exc}).") from exc
    if exists:
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
    """Return `source` with local files: a Hub repo is downloaded."""
    checkpoint = source.checkpoint
    if checkpoint.folder is not None:
        return source
    folder = hub.download(checkpoint)
    opened = open_folder(folder, checkpoint.name, checkpoint.revision)
    opened = replace(opened, trust_remote_code=checkpoint.trust_remote_code)
    return _source(opened, mlx_quantization(checkpoint.config) is not None, source.floats)


def file_hashes(source: Source, progress: Stage | None = None) -> dict[str, str]:
    """Compute the sha256 of every shard. Raises DamagedError if the Hub publishes another one."""
    return _published_hashes(source, hash_file, progress)


def remembered_hashes(source: Source) -> dict[str, str]:
    """Return the sha256 of every shard, computed once while the shard does not change.

    Raises DamagedError if the Hub publishes another one.
    """
    return _published_hashes(source, remembered_hash, None)


def _published_hashes(
    source: Source, hashed: Callable[..., str], progress: Stage | None
) -> dict[str, str]:
    hashes = {}
    for file in source.checkpoint.files:
        computed = hashed(source.checkpoint.path(file.name), file.name, progress)
        if file.sha256 not in (None, computed):
            raise DamagedError(
                f"{file.name}: sha256 is {computed}, published was {file.sha256}. Download it "
                "again."
            )
        hashes[file.name] = computed
    return hashes


def _source(checkpoint: Checkpoint, quantized: bool, floats: str) -> Source:
    model_type = checkpoint.settings.model_type
    if model_type is None:
        raise SourceError("config.json: model_type is missing.")
    if not (quantized and mlx_quantization(checkpoint.config)):
        _require_unquantized(checkpoint)
    layout = _describe(checkpoint)
    if floats != STORED and not quantized:
        cast_floats(layout, DTYPES.get(floats) or stated_dtype(checkpoint.config))
    inventory = Inventory(
        source=checkpoint.id,
        model_type=model_type,
        layers=layout.layers,
        experts=checkpoint.settings.experts,
        experts_per_token=checkpoint.settings.experts_per_token,
        weights=tuple(layout.weights),
        unquantized=tuple(layout.unquantized),
    )
    return Source(checkpoint, inventory, layout.views, floats)


def _describe(checkpoint: Checkpoint) -> Layout:
    model_type, layers = checkpoint.settings.model_type, checkpoint.settings.layers
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
    is_gpt_oss = checkpoint.settings.model_type == gpt_oss.MODEL_TYPE
    if mlx_quantization(config) is not None:
        if is_gpt_oss and gpt_oss.is_native(checkpoint):
            return
        raise SourceError(
            f"{checkpoint.name}: already quantized by mlx. Start from the published checkpoint "
            "(quantkit report shows the tiers of a quant)."
        )
    declared = config.get("quantization_config") or text_scope(config).get("quantization_config")
    if declared is not None and not isinstance(declared, dict):
        raise SourceError("config.json: quantization_config is not an object.")
    method = (declared or {}).get("quant_method")
    if method and not (method == "mxfp4" and is_gpt_oss):
        raise SourceError(
            f"{checkpoint.name}: already quantized ({method}). Start from its BF16 checkpoint."
        )
