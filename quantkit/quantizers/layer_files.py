"""The files of a calibrated run: the quantized tensors of every stage, and the streams between."""

from collections.abc import Mapping

import numpy as np

from quantkit.storage.work_dir import Tensors, WorkDirectory

QuantizedWeight = tuple[str, Tensors | None]
"""A weight's name and its stored tensors, in the order of its tier; None to round to nearest."""

EMBEDDING = -1  # the stage before layer 0; the stage of the head is the number of layers
_SUFFIXES = ("weight", "scales", "biases")


class LayerFiles:
    """The quantized tensors of every stage: embedding (-1), layers (0, 1, ...), head."""

    def __init__(self, work: WorkDirectory) -> None:
        self.work = work

    def has(self, stage: int) -> bool:
        """Return whether a stage is complete."""
        return self.work.has(self._name(stage))

    def save(self, stage: int, tensors: Mapping[str, Tensors]) -> None:
        """Write the tensors of a complete stage, by weight."""
        arrays = {
            f"{name}.{suffix}": values
            for name, stored in tensors.items()
            for suffix, values in zip(_SUFFIXES, stored, strict=False)
        }
        self.work.save_arrays(self._name(stage), arrays)

    def load(self, stage: int) -> dict[str, Tensors]:
        """Read the tensors of a stage, by weight."""
        tensors: dict[str, dict[str, np.ndarray]] = {}
        for key, values in self.work.arrays(self._name(stage)).items():
            name, _, suffix = key.rpartition(".")
            tensors.setdefault(name, {})[suffix] = values
        return {
            name: tuple(stored[suffix] for suffix in _SUFFIXES if suffix in stored)
            for name, stored in tensors.items()
        }

    def drop(self, stage: int) -> None:
        """Remove the tensors of a stage, and the optimizer state of its scale tuning.

        The best point of the tuning stays, in case a shard turns out to be damaged.
        """
        self.work.drop(self._name(stage))
        for name in (f"tune-{stage}-0", f"tune-{stage}-1", f"integers-{stage}"):
            self.work.drop(f"{name}.npz")

    @staticmethod
    def _name(stage: int) -> str:
        return f"quantized-{stage}.npz"
