"""The work directory: scratch from which an interrupted run resumes, each file atomic."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
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
    """A folder of named arrays and tables."""

    folder: Path

    def has(self, name: str) -> bool:
        """Return whether a file exists."""
        return (self.folder / name).exists()

    def save_array(self, name: str, values: mx.array) -> None:
        """Write an array of any shape. Raises OutputError when the disk is full."""
        with self._written(name) as file:
            np.save(file, np.array(values))

    def save_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write named arrays of any shape. Raises OutputError when the disk is full."""
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
                "same command again to resume."
            ) from exc

    @contextmanager
    def array_writer(
        self, name: str, shape: tuple[int, ...]
    ) -> Iterator[Callable[[mx.array], int]]:
        """Write a float32 array of `shape` a few rows at a time: yield a function that appends
        rows (n, ...). Raises OutputError when the disk is full.
        """
        with self._written(name) as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            yield lambda rows: file.write(np.array(rows, np.float32).data)

    def array_rows(self, name: str, start: int, stop: int) -> mx.array:
        """Read rows of an array of any shape; a map of the whole file would count as memory."""
        mapped = np.load(self.folder / name, mmap_mode="r")
        return mx.array(np.array(mapped[start:stop]))

    def rows(self, name: str) -> int:
        """Return the number of rows of an array."""
        return int(np.load(self.folder / name, mmap_mode="r").shape[0])

    def array(self, name: str) -> mx.array:
        """Read an array of any shape that `save_array` wrote."""
        return mx.array(np.load(self.folder / name))

    def save_table(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON object. Raises OutputError."""
        write_atomically(self.folder / name, json.dumps(value))

    def table(self, name: str) -> dict[str, Any]:
        """Read a JSON object. Raises OutputError."""
        return load_json(self.folder / name, OutputError)

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """Read the named arrays, of any shape, that `save_arrays` wrote."""
        with np.load(self.folder / name) as archive:
            return {key: archive[key] for key in archive.files}

    def rename(self, name: str, to: str) -> None:
        """Rename a file, replacing any of the new name."""
        (self.folder / name).replace(self.folder / to)

    def drop(self, name: str) -> None:
        """Remove a file, if it exists."""
        (self.folder / name).unlink(missing_ok=True)
