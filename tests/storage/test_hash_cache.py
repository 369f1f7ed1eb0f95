"""A file is hashed once, until it changes."""

import os
import time

import pytest

from quantkit.storage import hash_cache
from quantkit.storage.hash_cache import remembered_hash
from quantkit.storage.hashing import hash_file


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file of 2 MB, settled long ago as far as the cache can tell."""
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hash_cache, "_SETTLED_NS", -1)
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(2_000_000))
    return path


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that are really hashed."""
    names = []

    def counted(path, name, progress=None):
        names.append(name)
        return hash_file(path, name, progress)

    monkeypatch.setattr(hash_cache, "hash_file", counted)
    return names


def test_once(file, hashed):
    steps = []
    first = remembered_hash(file, "a")
    assert remembered_hash(file, "b", lambda n, name: steps.append((n, name))) == first
    assert hashed == ["a"]
    assert steps == [(2_000_000, "b")]
    assert first == hash_file(file, "a")


def test_a_change_of_equal_size_and_time_is_seen(file, hashed):
    remembered_hash(file, "a")
    stat = file.stat()
    file.write_bytes(b"\1" * 2_000_000)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert remembered_hash(file, "a") == hash_file(file, "a")
    assert len(hashed) == 2


def test_a_file_just_written_is_not_remembered(file, hashed, monkeypatch):
    monkeypatch.setattr(hash_cache, "_SETTLED_NS", 60_000_000_000)
    os.utime(file, ns=(time.time_ns(), time.time_ns()))
    remembered_hash(file, "a")
    remembered_hash(file, "a")
    assert hashed == ["a", "a"]


@pytest.mark.parametrize("content", ["{", "[]", '{"x": 1}'])
def test_a_damaged_cache_is_replaced(file, hashed, tmp_path, content):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "hashes.json").write_text(content)
    for _ in range(2):
        assert remembered_hash(file, "a") == hash_file(file, "a")
    assert hashed == ["a"]


def test_a_cache_that_cannot_be_written(file, hashed, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    for _ in range(2):
        assert remembered_hash(file, "a") == hash_file(file, "a")
    assert hashed == ["a", "a"]
