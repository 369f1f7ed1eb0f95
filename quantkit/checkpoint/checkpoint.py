"""A checkpoint: config, index and headers of a source repo, and its bytes on demand."""

import hashlib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from quantkit.artifacts.inventory import SourceFile, SourceId
from quantkit.checkpoint.foreign import recognize_files
from quantkit.checkpoint.headers import StoredTensor, read_header
from quantkit.checkpoint.model_config import ModelConfig, with_rope_settings
from quantkit.errors import SourceError, UnreadableError
from quantkit.formats.dtypes import numpy_dtype
from quantkit.storage.hashing import digest
from quantkit.storage.json_files import load_json
from quantkit.units import like_others

INDEX_FILE = "model.safetensors.index.json"
CHAT_TEMPLATES = "additional_chat_templates/*.jinja"
SINGLE_FILE = "model.safetensors"
_SAMPLE_BYTES = 4096
_MOST_BYTES = 1 << 30  # of one read: macOS can refuse 2 GiB
_BLOB = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Checkpoint:
    """A source repo, opened from its headers alone.

    `folder` is None if only the Hub's metadata is available: inventory and plans need no more.
    `stated_config` is the verbatim config.json. `trust_remote_code` lets a tokenizer run Python
    code of its repo. File descriptors of shards are opened on the first read, and stay open.
    """

    name: str
    revision: str | None
    folder: Path | None
    stated_config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    files: tuple[SourceFile, ...]
    trust_remote_code: bool = False
    _descriptors: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The config with its settings in the forms that mlx-lm reads."""
        return with_rope_settings(self.stated_config)

    @cached_property
    def settings(self) -> ModelConfig:
        """The parsed settings of the language model."""
        return ModelConfig.parse(self.config)

    @property
    def id(self) -> SourceId:
        """The identity: name, revision, files, and a hash of config and tensor names, types,
        shapes.
        """
        shapes = {name: [t.dtype, *t.shape] for name, t in self.tensors.items()}
        structure = digest({"config": dict(self.stated_config), "tensors": shapes})
        return SourceId(self.name, self.revision, structure, self.files)

    def read(self, tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
        """Read elements [start, stop) of `tensor` in row-major order, as a flat array (stop -
        start,).

        BF16 comes as its bits in uint16. Raises SourceError if the file has shrunk meanwhile.
        """
        dtype = numpy_dtype(tensor.dtype)
        assert 0 <= start <= stop <= tensor.nbytes // dtype.itemsize, f"{tensor.name}: {stop}"
        values = np.empty(stop - start, dtype)
        buffer = memoryview(values.view(np.uint8))
        offset = tensor.start + start * dtype.itemsize
        while len(buffer):
            try:
                done = os.preadv(self._descriptor(tensor.file), [buffer[:_MOST_BYTES]], offset)
            except OSError as exc:
                raise UnreadableError(f"{tensor.file}: cannot be read ({exc.strerror}).") from exc
            if done == 0:
                raise SourceError(
                    f"{tensor.file}: ends inside tensor {tensor.name!r}, though it was whole when "
                    "opened. Was it replaced meanwhile? Run again."
                )
            buffer, offset = buffer[done:], offset + done
        return values

    def fingerprint(self, file: SourceFile) -> str:
        """Hash a shard's size, layout, and 4 kB at both ends and in the middle of every tensor.

        Other weights of the same shapes give another hash, at the cost of a few MB of reading.
        """
        sha = hashlib.sha256(str(file.size).encode())
        for tensor in self.tensors.values():
            if tensor.file == file.name:
                sha.update(f"{tensor.name} {tensor.dtype} {tensor.start} {tensor.stop}".encode())
                for where in (0.0, 0.5, 1.0):
                    sha.update(self._sample(tensor, where).data)
        return sha.hexdigest()

    def _sample(self, tensor: StoredTensor, where: float) -> np.ndarray:
        elements = tensor.nbytes // numpy_dtype(tensor.dtype).itemsize
        length = min(elements, _SAMPLE_BYTES // numpy_dtype(tensor.dtype).itemsize)
        start = int(where * (elements - length))
        return self.read(tensor, start, start + length)

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            try:
                self._descriptors[file] = os.open(self.path(file), os.O_RDONLY)
            except OSError as exc:
                raise UnreadableError(f"{file}: cannot be read ({exc.strerror}).") from exc
        return self._descriptors[file]

    def path(self, file: str) -> Path:
        """Return the local path of one of the repo's files. Raises SourceError if not
        downloaded.
        """
        if self.folder is None:
            raise SourceError(f"{self.name}: only its metadata was fetched; download it first.")
        return self.folder / file

    def close(self) -> None:
        """Close the file descriptors of the shards."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def open_folder(folder: Path, name: str | None = None, revision: str | None = None) -> Checkpoint:
    """Open the checkpoint in a local folder. Raises SourceError naming the file at fault.

    Its name is `name`, else the name of the folder without its path, which would reveal a user's
    directories in the report.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder}: not a folder.")
    config = read_config(folder)
    weight_map, names = _weight_files(folder)
    files = tuple(_source_file(folder / file) for file in names)
    headers = {file.name: read_header(folder / file.name) for file in files}
    tensors = merge_headers(headers, weight_map)
    return Checkpoint(name or folder.resolve().name, revision, folder, config, tensors, files)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the `config.json` of a model folder. Raises SourceError."""
    if not (folder / "config.json").is_file():
        there = recognize_files(path.name for path in folder.iterdir())
        raise SourceError(
            f"{folder}: not a model folder: config.json is missing{f'; {there}' if there else '.'}"
        )
    return load_json(folder / "config.json", SourceError)


def merge_headers(
    headers: Mapping[str, Mapping[str, StoredTensor]], weight_map: Mapping[str, str] | None
) -> dict[str, StoredTensor]:
    """Merge the tensors of all shards into one table, checked against the index.

    Raises SourceError for a tensor in two shards, or a disagreement between index and headers.
    """
    tensors: dict[str, StoredTensor] = {}
    for file, header in headers.items():
        for name, tensor in header.items():
            if name in tensors:
                raise SourceError(
                    f"tensor {name!r} is stored twice, in {tensors[name].file} and in {file}. "
                    "Remove the wrong shard."
                )
            tensors[name] = tensor
    for name, file in (weight_map or {}).items():
        if name not in tensors or tensors[name].file != file:
            raise SourceError(
                f"{file}: tensor {name!r} is missing, though {INDEX_FILE} places it there. "
                "Download both again; if the shards are right, remove the index."
            )
    if weight_map is not None and (extra := tensors.keys() - weight_map.keys()):
        name = min(extra)
        raise SourceError(
            f"{tensors[name].file}: tensor {name!r} is not in "
            f"{INDEX_FILE}{like_others(len(extra))}. If the shards are right, remove the index: "
            "they can be read without it."
        )
    if not tensors:
        raise SourceError("the checkpoint holds no tensors.")
    return tensors


def check_weight_map(index: Mapping[str, Any], where: str) -> dict[str, str]:
    """Return the `weight_map` of an index, checked to hold plain file names. Raises SourceError."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{where}: has no weight_map. Download it again.")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file not in ("", ".", "..") and file.isprintable()
        if not plain or "\\" in file or "\0" in file or PurePosixPath(file).name != file:
            raise SourceError(
                f"{where}: places tensor {name!r} in {file!r}, which is not a plain file name in "
                "the model's folder. Do not trust this repo."
            )
    return weight_map


def _weight_files(folder: Path) -> tuple[dict[str, str] | None, list[str]]:
    index = None
    if (folder / INDEX_FILE).is_file():
        index = check_weight_map(load_json(folder / INDEX_FILE, SourceError), INDEX_FILE)
    return choose_files({path.name for path in folder.iterdir()}, index, str(folder))


def choose_files(
    present: Collection[str], weight_map: dict[str, str] | None, where: str
) -> tuple[dict[str, str] | None, list[str]]:
    """Return the index to use, and the safetensors files of the checkpoint.

    The files are those in the index. Without an index, or with one whose files are all absent, they
    are the files that mlx-lm loads: every model*.safetensors, and the index is None. Raises
    SourceError if there are no files.
    """
    loaded = sorted(name for name in present if fnmatchcase(name, "model*.safetensors"))
    if weight_map is not None:
        named = set(weight_map.values())
        if named & set(present) or not loaded:
            return weight_map, sorted(named)
    if loaded:
        return None, loaded
    there = recognize_files(present) or "found no weights at all."
    raise SourceError(f"{where}: neither {INDEX_FILE} nor model*.safetensors exists; {there}")


def _source_file(path: Path) -> SourceFile:
    try:
        size = path.stat().st_size
    except OSError as exc:
        raise SourceError(
            f"{path.name}: missing from {path.parent}, though the index names it. "
            "Download the file again."
        ) from exc
    # In the Hub's cache a shard is a symbolic link to a blob named by its sha256.
    blob = path.resolve().name
    return SourceFile(path.name, size, blob if _BLOB.fullmatch(blob) else None)
