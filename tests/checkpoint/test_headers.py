"""Headers that lie."""

import json
import re
import struct

import numpy as np
import pytest
import safetensors.numpy

from quantkit.checkpoint.headers import read_header
from quantkit.errors import SourceError
from quantkit.formats.files import write_file
from quantkit.formats.tiers import TensorSpec


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start, stop, shape, dtype="U8"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.fixture
def path(tmp_path):
    (tmp_path / "src").mkdir()
    return tmp_path / "src" / "model.safetensors"


def test_reads_what_safetensors_writes(path):
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.uint8)}
    safetensors.numpy.save_file(values, path, metadata={"format": "np"})
    tensors = read_header(path)
    raw = path.read_bytes()
    for name, value in values.items():
        assert raw[tensors[name].start : tensors[name].stop] == value.tobytes()
        assert tensors[name].shape == value.shape


def test_safetensors_reads_what_we_write(path):
    values = np.arange(12, dtype=np.uint32).reshape(3, 4)
    write_file(path, [(TensorSpec("a", "U32", (3, 4)), values)])
    assert np.array_equal(safetensors.numpy.load_file(path)["a"], values)


HOSTILE = {
    "empty file": (None, b"", None, "truncated or not a safetensors"),
    "length beyond the file": ({}, b"", 10_000, "header of 10000 bytes in a file of 10"),
    "length beyond memory": ({}, b"", 2**63, "truncated or not a safetensors"),
    "not JSON": (b"{nonsense", b"", None, "not valid JSON"),
    "deep JSON": (b"[" * 100_000, b"", None, "not valid JSON"),
    "no object": (b"[1, 2]", b"", None, "not a JSON object"),
    "entry is not an object": ({"a": 3}, b"", None, "'a' has no complete header entry"),
    "no offsets": ({"a": {"dtype": "U8", "shape": [1]}}, b"x", None, "'a' has no complete header entry"),
    "negative shape": ({"a": entry(0, 4, [-4])}, b"xxxx", None, "'a' has an invalid header entry"),
    "negative offset": ({"a": entry(-4, 0, [4])}, b"xxxx", None, "'a' has an invalid header entry"),
    "shape of text": ({"a": entry(0, 4, "4")}, b"xxxx", None, "'a' has an invalid header entry"),
    "unknown dtype": ({"a": entry(0, 4, [4], "Q4")}, b"xxxx", None, "'a': element type Q4"),
    "size against shape": ({"a": entry(0, 4, [5])}, b"xxxx", None, r"needs 5 bytes.*hold 4"),
    "out of range": ({"a": entry(0, 8, [8])}, b"xxxx", None, "truncated: tensor 'a' ends at"),
    "overlap": (
        {"a": entry(0, 4, [4]), "b": entry(2, 6, [4])}, b"x" * 6, None, "'b' overlaps tensor 'a'",
    ),
    "gap": (
        {"a": entry(0, 2, [2]), "b": entry(4, 6, [2])}, b"x" * 6, None, "2 bytes between tensor 'a'",
    ),
    "trailing bytes": ({"a": entry(0, 2, [2])}, b"xxxx", None, "2 bytes after tensor 'a'"),
    "duplicate": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x", None, "'a' appears twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header(path, refused, case):
    header, data, length, message = HOSTILE[case]
    if header is None:
        path.write_bytes(b"")
    else:
        write(path, header, data, length)
    with pytest.raises(SourceError, match=message):
        read_header(path)
    path.with_name("config.json").write_text('{"model_type": "gpt_oss"}')
    line = refused(path.parent)
    assert re.search(message, line)
    assert "model.safetensors" in line
