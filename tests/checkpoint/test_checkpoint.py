import json
import os
import re
import shutil

import numpy as np
import pytest

from quantkit.checkpoint.checkpoint import open_folder
from quantkit.checkpoint.source import file_hashes, open_source
from quantkit.errors import SourceError
from quantkit.formats.dtypes import numpy_dtype
from tests.support import tiny

INDEX = "model.safetensors.index.json"
FIRST = "model-00000-of-00001.safetensors"
SECOND = "model-00001-of-00001.safetensors"
SECOND = "model-00001-of-00001.safetensors"


@pytest.fixture
def source(tmp_path, checkpoint):
    return shutil.copytree(checkpoint, tmp_path / "src")


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def places(file):
    return lambda folder: edit_index(
        folder, lambda index: index["weight_map"].update({"lm_head.weight": file})
    )


def truncate(folder):
    with open(folder / FIRST, "r+b") as file:
        file.truncate((folder / FIRST).stat().st_size - 1)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def duplicate(folder):
    tensors = tiny.gpt_oss_tensors()
    tiny.write_checkpoint(folder, tiny.CONFIG, [*tensors, tensors[0]], shards=2)


BAD = {
    "no config": (
        lambda f: (f / "config.json").unlink(),
        "not a model folder: config.json is missing",
    ),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not valid"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    "no model_type": (lambda f: (f / "config.json").write_text("{}"), "model_type is missing"),
    "no weights": (
        lambda f: [(f / name).unlink() for name in (INDEX, FIRST, SECOND)],
        "neither model.safetensors.index.json nor model\\*.safetensors exists; found no weights",
    ),
    "missing shard": (lambda f: (f / FIRST).unlink(), f"{FIRST}: missing from"),
    "truncated shard": (truncate, f"{FIRST}: truncated: tensor"),
    "index without map": (lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
    "parent folder": (places("../evil.safetensors"), r"in '\.\./evil.safetensors', which is no"),
    "absolute path": (places("/etc/passwd"), "in '/etc/passwd', which is not a plain file name"),
    "dots": (places(".."), "not a plain file name"),
    "backslashes": (places("..\\evil.safetensors"), "not a plain file name"),
    "number": (places(3), "not a plain file name"),
    "subfolder": (places("sub/model.safetensors"), "not a plain file name"),
    "wrong shard": (places(SECOND), f"{SECOND}: tensor 'lm_head.weight' is missing, though"),
    "not in index": (
        lambda f: edit_index(f, lambda index: index["weight_map"].pop("lm_head.weight")),
        "'lm_head.weight' is not in model.safetensors.index.json",
    ),
    "duplicate tensor": (duplicate, "is stored twice"),
    "more layers than tensors": (
        lambda f: (f / "config.json").write_text(
            json.dumps({**tiny.CONFIG, "num_hidden_layers": 10**12, "layer_types": None})
        ),
        "1000000000000 layers, but the shards hold",
    ),
    "no text for a name": (places("\ud800"), "not a plain file name"),
    "pipe for a shard": (lambda f: pipe(f / FIRST), f"{FIRST}: not a plain file"),
    "pipe for a config": (lambda f: pipe(f / "config.json"), "config.json is missing"),
    "quantization_config is text": (
        lambda f: (f / "config.json").write_text(
            json.dumps({"model_type": "llama", "quantization_config": "mxfp4"})
        ),
        "quantization_config is not an object",
    ),
    "layer_types is a number": (
        lambda f: (f / "config.json").write_text(json.dumps({**tiny.CONFIG, "layer_types": 5})),
        "layer_types is not a list of names",
    ),
    "not UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), "not UTF-8 text"),
    "already an mlx quant": (
        lambda f: (f / "config.json").write_text(
            json.dumps({**tiny.CONFIG, "quantization": {"group_size": 64, "bits": 4}})
        ),
        "already quantized by mlx",
    ),
    "quantized otherwise": (
        lambda f: (f / "config.json").write_text(
            json.dumps({"model_type": "llama", "quantization_config": {"quant_method": "awq"}})
        ),
        r"already quantized \(awq\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folder(source, refused, case):
    change, message = BAD[case]
    change(source)
    assert re.search(message, refused(source))


def test_not_a_folder(tmp_path):
    with pytest.raises(SourceError, match="no such folder, and not a Hub id"):
        open_source(str(tmp_path / "nowhere" / "at" / "all"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="not a folder"):
        open_source(str(tmp_path / "file"))


def test_links_of_the_hub_cache_are_followed(tmp_path, checkpoint):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    hashes = file_hashes(open_source(str(checkpoint)))
    for path in checkpoint.iterdir():
        blob = blobs / hashes.get(path.name, f"{path.name}-blob")
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(blob)
    opened = open_source(str(snapshot))
    assert {file.name: file.sha256 for file in opened.checkpoint.files} == hashes
    assert opened.inventory.source.structure == open_source(str(checkpoint)).inventory.source.structure  # fmt: skip


def test_structure_is_that_of_names_types_shapes_and_config(tmp_path, checkpoint):
    one = open_folder(checkpoint).id.structure
    resharded = tiny.write_checkpoint(tmp_path / "a", tiny.CONFIG, tiny.gpt_oss_tensors(), shards=3)
    assert open_folder(resharded).id.structure == one
    other = {**tiny.CONFIG, "rope_theta": 5}
    assert open_folder(tiny.write_gpt_oss(tmp_path / "b", config=other)).id.structure != one


def test_large_tensors_are_read_in_parts(checkpoint, monkeypatch):
    """macOS can refuse to read 2 GiB at once."""
    opened = open_source(str(checkpoint)).checkpoint
    tensor = max(opened.tensors.values(), key=lambda tensor: tensor.nbytes)
    count = tensor.nbytes // numpy_dtype(tensor.dtype).itemsize
    whole = opened.read(tensor, 0, count)
    asked, preadv = [], os.preadv

    def counting(descriptor, buffers, offset):
        asked.append(sum(len(buffer) for buffer in buffers))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr("quantkit.checkpoint.checkpoint.os.preadv", counting)
    monkeypatch.setattr("quantkit.checkpoint.checkpoint._MOST_BYTES", 1000)
    assert np.array_equal(opened.read(tensor, 0, count), whole)
    assert max(asked) == 1000
    assert sum(asked) == tensor.nbytes


def test_a_shard_that_shrinks_after_opening(source):
    opened = open_folder(source)
    tensor = max(opened.tensors.values(), key=lambda t: t.stop if t.file == FIRST else 0)
    with open(source / FIRST, "r+b") as file:
        file.truncate(tensor.start + 1)
    with pytest.raises(SourceError, match="was whole when opened"):
        opened.read(tensor, 0, int(np.prod(tensor.shape)))
