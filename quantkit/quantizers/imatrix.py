"""The `search` quantizer from a published importance matrix, without a pass of the model.

llama.cpp's imatrix is a GGUF file with two tensors per weight: `in_sum2` (matrices, in), the sums
of squared inputs per channel, and `counts` (matrices, 1), the tokens that they are over.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.artifacts.calibration import CalibrationText, ExpertInputs
from quantkit.artifacts.experts import KeptExperts, block_of
from quantkit.artifacts.inventory import Inventory, Weight
from quantkit.artifacts.plan import Plan
from quantkit.backend import mx
from quantkit.backend.memory_limits import memory_limits
from quantkit.errors import InputError
from quantkit.formats.codec import to_numpy
from quantkit.formats.tiers import Tier
from quantkit.progress import Progress
from quantkit.quantizers.hessians import DEFAULT_PRIOR
from quantkit.quantizers.layerwise import changed_tiers
from quantkit.quantizers.matrix import require_finite, scales_dtype
from quantkit.quantizers.search import search
from quantkit.storage.hashing import hash_file
from quantkit.storage.work_dir import Tensors
from quantkit.streaming.layer_runner import StreamingModel

_NAMES = {
    "embedding": "token_embd",
    "lm_head": "output",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "router": "ffn_gate_inp",
    "expert_gate": "ffn_gate_exps",
    "expert_up": "ffn_up_exps",
    "expert_down": "ffn_down_exps",
    "mlp_gate": "ffn_gate",
    "mlp_up": "ffn_up",
    "mlp_down": "ffn_down",
}
_LEAST = 1e-6  # of a weight's mean importance, for channels without any


@dataclass(frozen=True)
class Imatrix:
    """The `importance` (matrices, in) of weights, by our names, and the `inputs` of each matrix.

    `text` describes the file as a calibration text.
    """

    importance: Mapping[str, np.ndarray]
    inputs: Mapping[str, np.ndarray]
    text: CalibrationText

    def pruned(self, kept: KeptExperts) -> "Imatrix":
        """Return the imatrix of a model that holds only the experts `kept`."""

        def cut(name: str, values: np.ndarray) -> np.ndarray:
            block = block_of(name)
            return values[list(kept[block])] if len(values) > 1 and block in kept else values

        return replace(
            self,
            importance={name: cut(name, x) for name, x in self.importance.items()},
            inputs={name: cut(name, x) for name, x in self.inputs.items()},
        )


def load_imatrix(path: Path, inventory: Inventory) -> Imatrix:
    """Load the imatrix of a model. Raises InputError if it is damaged, or of another model."""
    arrays, metadata = _read(path)
    importance, inputs = {}, {}
    for weight in inventory.weights:
        name = f"{_gguf_name(weight)}.weight"
        if (sums := arrays.get(f"{name}.in_sum2")) is None:
            continue
        sums = sums.reshape(-1, sums.shape[-1])  # GGUF stores a single row in one dimension
        counts = arrays.get(f"{name}.counts", np.zeros(0)).reshape(-1)
        matrices = weight.shape[0] if len(weight.shape) > 2 else 1
        if sums.shape != (matrices, weight.shape[-1]) or counts.shape != (matrices,):
            raise InputError(
                f"`imatrix` {path}: {name} has the shape {sums.shape} for {counts.size} counts, "
                f"but {weight.name} needs {(matrices, weight.shape[-1])}. It is of another model."
            )
        if not (np.isfinite(sums).all() and (sums >= 0).all() and (counts >= 0).all()):
            raise InputError(f"`imatrix` {path}: {name} is damaged. Download it again.")
        if counts.any():
            importance[weight.name] = _shrunk(sums, counts)
            inputs[weight.name] = counts
    if not importance:
        raise InputError(f"`imatrix` {path}: names no weight of this model.")
    text = CalibrationText(
        name=f"imatrix {path.name}",
        licence="",
        sequences=int(metadata.get("imatrix.chunk_count", 0)),
        sequence_length=int(metadata.get("imatrix.chunk_size", 0)),
        seed=0,
        sha256=hash_file(path, path.name),
        sketch="",
    )
    return Imatrix(importance, inputs, text)


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays and metadata of a GGUF file. Raises InputError."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as exc:
        raise InputError(f"`imatrix` {path}: cannot be read ({exc.strerror}).") from exc
    if magic != b"GGUF":
        raise InputError(
            f"`imatrix` {path}: is not a GGUF file. llama-imatrix converts the older format: "
            "llama-imatrix --in-file OLD.dat -o NEW.gguf"
        )
    try:
        loaded: Any = mx.load(str(path), format="gguf", return_metadata=True)
    except (RuntimeError, ValueError) as exc:
        raise InputError(f"`imatrix` {path}: is damaged. Download it again.") from exc
    arrays, metadata = loaded
    return {name: np.array(value) for name, value in arrays.items()}, metadata


def _gguf_name(weight: Weight) -> str:
    name = _NAMES.get(weight.role, weight.role)
    return name if weight.layer is None else f"blk.{weight.layer}.{name}"


def _shrunk(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return mean squared inputs (matrices, in), those of rarely used experts shrunk as Hessians
    are.
    """
    prior, width = DEFAULT_PRIOR, sums.shape[-1]
    counts = counts[:, None]
    pooled = prior.pooled * width * sums.sum(axis=0) / counts.sum()
    weighted = sums * (1 + prior.diagonal * width / np.maximum(counts, 1))
    mean = (weighted + pooled) / (counts + (prior.pooled + prior.diagonal) * width)
    return np.asarray(np.maximum(mean, _LEAST * mean.mean()), np.float32)


@dataclass(frozen=True)
class ImatrixQuantization:
    """A plan to quantize by an imatrix; weights that it lacks are rounded to nearest."""

    model: StreamingModel
    plan: Plan
    imatrix: Imatrix

    def weights(
        self, shards: Sequence[Sequence[str]], folder: Path, progress: Progress
    ) -> Iterator[tuple[str, Tensors | None]]:
        """Yield the quantized weights of `shards`, which list names, in their order."""
        del folder  # there is nothing to resume from
        tiers = changed_tiers(self.model.source, self.plan)
        affine = {name: tier for name, tier in tiers.items() if tier.mode == "affine"}
        if missing := sorted(affine.keys() - self.imatrix.importance.keys()):
            progress.note(
                f"the imatrix lacks {len(missing)} weights ({missing[0]}): rounded to nearest"
            )
        named = affine.keys() & self.imatrix.importance.keys()
        stage = progress.stage("Quantizing", len(named), "weights")
        for name in (name for names in shards for name in names):
            yield name, self._quantized(name, affine[name]) if name in named else None
            stage(name in named, name)

    def _quantized(self, name: str, tier: Tier) -> Tensors:
        """Quantize a weight, some rows of a matrix at a time."""
        weight = self.model.weights[name]
        rows, width = weight.shape[-2:]
        step = max(1, memory_limits().block_values // width)
        read = rows if len(weight.shape) > 2 else step  # experts are read whole
        blocks: list[tuple[mx.array, ...]] = []
        for matrix, importance in enumerate(self.imatrix.importance[name]):
            for first in range(matrix * rows, (matrix + 1) * rows, read):
                values = self.model.values(name, first, min(first + read, (matrix + 1) * rows))
                require_finite(name, values)
                for start in range(0, len(values), step):
                    block = search(
                        values[start : start + step].astype(mx.float32),
                        mx.array(importance),
                        tier,
                        scales_dtype(weight),
                    )
                    blocks.append(block.packed(tier))
                    mx.eval(blocks[-1])
        return tuple(to_numpy(mx.concatenate(list(x))) for x in zip(*blocks, strict=True))

    def expert_inputs(self, folder: Path) -> dict[str, ExpertInputs]:
        """Return how many inputs the experts of each stack had."""
        del folder
        return {
            name: ExpertInputs.of(counts, self.model.weights[name])
            for name, counts in self.imatrix.inputs.items()
            if len(counts) > 1
        }

    def work_bytes(self, shard_bytes: int) -> int:
        """Return 0: it works in memory."""
        del shard_bytes
        return 0
