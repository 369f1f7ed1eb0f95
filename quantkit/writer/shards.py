"""Output shards: their layout, decided to the byte before writing, and their writer.

A shard is written front to back, so that its hash is ready at its end, and takes its final name
once it is on disk.
"""

import hashlib
import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from quantkit.artifacts.inventory import Inventory
from quantkit.artifacts.plan import Plan
from quantkit.artifacts.report import ShardRecord
from quantkit.errors import OutputError
from quantkit.formats.files import header_bytes
from quantkit.formats.tiers import TensorSpec, Tier, parse_tier
from quantkit.storage.output_dir import sync_folder

_QUEUE = 8  # blocks on their way to the disk


@dataclass(frozen=True)
class Unit:
    """The tensors of one weight, or one unquantized tensor.

    `tier` is the physical tier to encode in, None if the stored values are copied.
    """

    name: str
    tensors: tuple[TensorSpec, ...]
    tier: Tier | None

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors)


@dataclass(frozen=True)
class Shard:
    """One output file: its units in writing order, and the header that describes them."""

    name: str
    units: tuple[Unit, ...]

    @property
    def tensor_bytes(self) -> int:
        return sum(unit.nbytes for unit in self.units)

    @property
    def header(self) -> bytes:
        """The safetensors header, its length prefix included."""
        return header_bytes((spec for unit in self.units for spec in unit.tensors), "mlx")


def lay_out(inventory: Inventory, plan: Plan, shard_bytes: int) -> tuple[Shard, ...]:
    """Fill shards greedily in the order of the model, each with up to `shard_bytes` of tensors.

    A larger unit gets a shard of its own.
    """
    shards: list[list[Unit]] = [[]]
    filled = 0
    for unit in _units(inventory, plan):
        if shards[-1] and filled + unit.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(unit)
        filled += unit.nbytes
    total = len(shards)
    if total == 1:
        return (Shard("model.safetensors", tuple(shards[0])),)
    return tuple(
        Shard(f"model-{number:05d}-of-{total:05d}.safetensors", tuple(units))
        for number, units in enumerate(shards, start=1)
    )


def _units(inventory: Inventory, plan: Plan) -> list[Unit]:
    """Return the units in the order of the model: embedding, layers, norm, head."""
    placed: list[tuple[int, Unit]] = []
    for weight, assignment in zip(inventory.weights, plan.assignments, strict=True):
        storage = parse_tier(weight.storage)
        physical = parse_tier(assignment.storage)
        specs = physical.tensors(weight.name, weight.shape, weight.dtype)
        tier = None if physical == storage else physical
        placed.append((_place(weight.layer, weight.role), Unit(weight.name, specs, tier)))
    for tensor in inventory.unquantized:
        spec = TensorSpec(tensor.name, tensor.dtype, tensor.shape)
        placed.append((_place(tensor.layer, tensor.role), Unit(tensor.name, (spec,), None)))
    return [unit for _, unit in sorted(placed, key=lambda pair: pair[0])]


def _place(layer: int | None, role: str) -> int:
    if layer is not None:
        return layer
    return -1 if role == "embedding" else 1 << 30


class ShardWriter:
    """Writes one shard in a thread of its own: hashing and disk overlap with computing.

    Use as a context manager and call `finish`; leaving it earlier drops the shard.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        self._shard = shard
        self._path = folder / shard.name
        self._temporary = folder / f"{shard.name}.tmp"
        self._queue: queue.Queue[np.ndarray | bytes | None] = queue.Queue(_QUEUE)
        self._sha = hashlib.sha256()
        self._size = 0
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"write {shard.name}")

    def __enter__(self) -> "ShardWriter":
        self._thread.start()
        self._queue.put(self._shard.header)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self._temporary.unlink(missing_ok=True)

    def write(self, block: np.ndarray | bytes) -> None:
        """Append `block`, an array of any shape. Raises OutputError if an earlier block failed."""
        self._check()
        self._queue.put(block)

    def finish(self) -> ShardRecord:
        """Wait for the disk, then rename the shard. Raises OutputError."""
        self._queue.put(None)
        self._thread.join()
        self._check()
        tensor_bytes = self._size - len(self._shard.header)
        assert tensor_bytes == self._shard.tensor_bytes, f"{self._shard.name}: {self._size} bytes"
        try:
            self._temporary.replace(self._path)
            sync_folder(self._path.parent)
        except OSError as exc:
            raise OutputError(f"{self._path}: cannot be renamed ({exc.strerror}).") from exc
        return ShardRecord(self._shard.name, self._size, tensor_bytes, self._sha.hexdigest())

    def _check(self) -> None:
        if isinstance(self._error, OSError):
            raise OutputError(
                f"{self._path}: cannot be written ({self._error.strerror}). Finished shards are "
                "kept: make room and run again."
            ) from self._error
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            with open(self._temporary, "wb", buffering=0) as file:
                for block in self._blocks():
                    view = memoryview(block).cast("B") if len(block) else memoryview(b"")
                    self._sha.update(view)
                    self._size += len(view)
                    while len(view):
                        view = view[file.write(view) :]
                os.fsync(file.fileno())
        except Exception as exc:  # noqa: BLE001  (handed to the thread that writes)
            self._error = exc
            for _ in self._blocks():  # the writing thread must not block for ever
                pass

    def _blocks(self) -> Iterator[np.ndarray | bytes]:
        while (block := self._queue.get()) is not None:
            yield block
