"""Checkpoints on the Hub, through the real client, against a stand-in on loopback."""

import json
import shutil
from collections import namedtuple

import pytest

from quantkit.artifacts.inventory import SourceFile
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.hub import _require_space
from quantkit.checkpoint.source import file_hashes, open_source
from quantkit.errors import OutputError
from tests.support import hub, tiny


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A checkpoint whose weights would be noticed if they were downloaded."""
    config = {**tiny.CONFIG, "vocab_size": 4096}
    return tiny.write_gpt_oss(tmp_path_factory.mktemp("hub") / "big", config=config)


def test_planned_from_metadata_alone(online, big):
    with hub.serving({"openai/tiny": big}) as (endpoint, log):
        planned = online(endpoint, "plan", "openai/tiny", "-r", "mxfp4-q8", "--json")
        inspected = online(endpoint, "inspect", "openai/tiny", "--json")
    assert planned.returncode == inspected.returncode == 0, planned.stderr
    plan, inventory = json.loads(planned.stdout), json.loads(inspected.stdout)
    local = open_source(str(big))
    assert inventory["total_bytes"] == local.inventory.total_bytes
    assert plan["source"]["structure"] == local.inventory.source.structure
    assert plan["source"]["revision"] == hub.COMMIT
    hashes = {file["name"]: file["sha256"] for file in plan["source"]["files"]}
    assert hashes == file_hashes(local)
    shards = sum(size for _, path, size in log if path.endswith(".safetensors"))
    assert 0 < shards < local.inventory.total_bytes


def test_quantized_from_the_hub(online, tmp_path, checkpoint):
    with hub.serving({"openai/tiny": checkpoint}) as (endpoint, _):
        done = online(endpoint, "quantize", "openai/tiny", "-r", "mxfp4-q8", "-o", "out", "--json")
        assert done.returncode == 0, done.stderr
        before = tmp_path / "out" / "quantkit.json"
        report = json.loads(before.read_text())
    assert json.loads(done.stdout) == report
    assert report["source"]["name"] == "openai/tiny"
    assert report["source"]["revision"] == hub.COMMIT
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: openai/tiny\nbase_model_relation: quantized" in card
    # Once downloaded it needs no Hub any more.
    again = online("http://127.0.0.1:9", "plan", "openai/tiny", "-r", "uniform-4", "--json")
    assert again.returncode == 0, again.stderr


def test_a_downloaded_repo_is_found_again(online, tmp_path, checkpoint):
    """It is complete without the folders that are left out, and asks for no more space."""
    folder = tmp_path / "published"
    shutil.copytree(checkpoint, folder)
    (folder / "original").mkdir()
    (folder / "original" / "model.bin").write_bytes(bytes(1000))
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    first, second, full = (("quantize", "openai/tiny", "-o", name) for name in ("a", "b", "c"))
    with hub.serving({"openai/tiny": folder}) as (endpoint, log):
        done = online(endpoint, *first, "-r", "mxfp4-q8")
        assert done.returncode == 0, done.stderr
        log.clear()
        done = online(endpoint, *second, "-r", "uniform-4")
        assert done.returncode == 0, done.stderr
        read = [path for _, path, size in log if path.endswith(".safetensors") and size]
        assert len(read) == len(set(read)), read  # its header, and nothing else
    done = online("http://127.0.0.1:9", *full, "-r", "uniform-3")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("suffix", ["", ".incomplete"])
def test_space_is_needed_for_what_the_cache_lacks(tmp_path, monkeypatch, suffix):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 700)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    file = SourceFile("model.safetensors", 1000, "abc")
    found = Checkpoint("openai/tiny", hub.COMMIT, None, {}, {}, (file,))
    with pytest.raises(OutputError, match="needed for the download"):
        _require_space(found)
    blobs = tmp_path / "models--openai--tiny" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"abc{suffix}").write_bytes(bytes(400))
    _require_space(found)


def one_line(done):
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_unreachable(online, tmp_path):
    message = one_line(online("http://127.0.0.1:9", "inspect", "openai/tiny"))
    assert "openai/tiny: the Hub cannot be reached" in message


def test_no_such_repo(online, tmp_path):
    with hub.serving({}) as (endpoint, _):
        done = online(endpoint, "quantize", "openai/none", "-r", "mxfp4-q8", "-o", "out")
    assert "openai/none: neither a local folder nor a repo on the Hub" in one_line(done)
    assert not (tmp_path / "out").exists()


def test_repo_without_weights(online, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    with hub.serving({"openai/bare": tmp_path / "bare"}) as (endpoint, _):
        message = one_line(online(endpoint, "inspect", "openai/bare"))
    assert (
        "openai/bare: neither model.safetensors.index.json nor model*.safetensors exists" in message
    )


def test_repo_without_config(online, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "README.md").write_text("")
    with hub.serving({"openai/bare": tmp_path / "bare"}) as (endpoint, _):
        message = one_line(online(endpoint, "inspect", "openai/bare"))
    assert "openai/bare: not a model repo: config.json" in message
