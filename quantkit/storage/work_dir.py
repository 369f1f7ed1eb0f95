"""What an interrupted run goes on from: arrays and tables, each written whole or not at all."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from quantkit.backend import mx
from quantkit.errors import OutputError
from quantkit.storage.json_files import load_json, write_atomically

Tensors = tuple[np.ndarray, ...]
"""A weight's stored tensors, in the order of its tier, as numpy carriers."""


@dataclass(frozen=True)
class WorkDirectory:
    """A folder of named parts."""

    folder: Path

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def save_array(self, name: str, values: mx.array) -> None:
        """Raises OutputError when the disk is full."""
        with self._written(name) as file:
            np.save(file, np.array(values))

    def save_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Raises OutputError when the disk is full."""
        with self._written(name) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @contextmanager
    def _written(self, name: str) -> Iterator[IO[bytes]]:
        temporary = self.folder / f"{name}.tmp"
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.folder / name)
        except OSError as exc:
            temporary.unlink(missing_ok=True)
            raise OutputError(
                f"{self.folder / name}: cannot be written ({exc.strerror}). Make room, and run the "
                "same command again to go on."
            ) from exc

    def array(self, name: str) -> mx.array:
        return mx.array(np.load(self.folder / name))

    def save_table(self, name: str, value: Mapping[str, Any]) -> None:
        """Raises OutputError."""
        write_atomically(self.folder / name, json.dumps(value))

    def table(self, name: str) -> dict[str, Any]:
        return load_json(self.folder / name, OutputError)

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """What `save_arrays` saved."""
        with np.load(self.folder / name) as found:
            return {key: found[key] for key in found.files}

    def drop(self, name: str) -> None:
        """Remove a part, if it is there."""
        (self.folder / name).unlink(missing_ok=True)
