"""Uploads through the Hub's real client, against a stand-in on loopback."""

import json
import shutil

import mlx_lm
import pytest

from quantkit.allocate.recipe import load_recipe, plan_by_recipe
from quantkit.pipeline import quantize
from quantkit.source.source import open_source
from tests import hub

LOGGED_IN = {"HF_TOKEN": hub.TOKEN}


@pytest.fixture(scope="module")
def written(tmp_path_factory, checkpoint):
    source = open_source(str(checkpoint))
    plan = plan_by_recipe(source.inventory, load_recipe("mxfp4-q8"))
    out = tmp_path_factory.mktemp("repo") / "out"
    quantize(source, plan, out, shard_bytes=300_000)
    return out


@pytest.fixture
def out(written, tmp_path):
    return shutil.copytree(written, tmp_path / "out")


@pytest.fixture
def there(tmp_path):
    """Where the stand-in puts new repos."""
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_what_arrives_loads_in_stock_mlx_lm(online, out, there):
    with hub.serving({}, there) as (endpoint, _):
        shown = online(endpoint, "upload", out, "user/tiny", "--dry-run", "--json")
        done = online(endpoint, "upload", out, "user/tiny", "--private", **LOGGED_IN)
        assert done.returncode == 0, done.stderr
    assert "Sent: " in done.stdout
    planned = dict(json.loads(shown.stdout)["files"])
    assert {name: len(data) for name, data in contents(there / "tiny").items()} == planned
    assert contents(there / "tiny") == contents(out)
    assert "--model user/tiny" in (out / "README.md").read_text()
    assert json.loads((out / "quantkit.json").read_text())["repo"] == "user/tiny"
    model, tokenizer = mlx_lm.load(str(there / "tiny"))
    assert mlx_lm.generate(model, tokenizer, tokenizer.encode("The"), max_tokens=2) is not None
    assert hub.TOKEN not in done.stdout + done.stderr
    assert not any(hub.TOKEN.encode() in data for data in contents(out).values())


def test_a_dry_run_needs_no_hub_and_changes_nothing(online, out):
    before = contents(out)
    (out / "notes.txt").write_text("private")
    shown = online("http://127.0.0.1:9", "upload", out, "user/tiny", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "model.safetensors.index.json" in shown.stdout
    assert "notes.txt" not in shown.stdout
    assert "Nothing was sent" in shown.stdout
    (out / "notes.txt").unlink()
    assert contents(out) == before


def test_a_dropped_connection_is_made_good(online, out, there):
    """The client sends the part again by itself."""
    dropped = []

    def drops(path):
        if path.endswith("/1") and path not in dropped:
            dropped.append(path)
            return len(dropped) == 1
        return False

    with hub.serving({}, there, drops) as (endpoint, log):
        done = online(endpoint, "upload", out, "user/tiny", **LOGGED_IN)
    assert done.returncode == 0, done.stderr
    assert any(method == "DROPPED" for method, _, _ in log)
    assert contents(there / "tiny") == contents(out)


def test_an_interrupted_upload_goes_on(online, out, there):
    """The line is gone for good in the middle; the next run sends only what is missing."""
    whole = sorted(path.name for path in out.glob("model*.safetensors"))
    assert len(whole) > 2
    last = hub.sha256(out / whole[-1])
    gone = True
    with hub.serving({}, there, lambda path: gone and last in path) as (endpoint, log):
        failed = online(endpoint, "upload", out, "user/tiny", **LOGGED_IN)
        assert failed.returncode == 2
        assert failed.stderr.startswith("error: ")
        assert failed.stderr.count("\n") == 1
        assert "run the same command to go on" in failed.stderr
        assert not list((there / "tiny").glob("*.safetensors"))
        first = {path for method, path, _ in log if method == "PUT"}
        assert first
        log.clear()
        gone = False
        done = online(endpoint, "upload", out, "user/tiny", **LOGGED_IN)
    assert done.returncode == 0, done.stderr
    again = {path for method, path, _ in log if method == "PUT"}
    assert again
    assert not again & first
    assert contents(there / "tiny") == contents(out)


def test_shards_of_an_earlier_upload_are_removed(online, out, there):
    old = there / "tiny"
    old.mkdir()
    (old / "quantkit.json").write_text("{}")
    (old / "config.json").write_text("{}")
    (old / "model-00009-of-00009.safetensors").write_bytes(b"old")
    (old / "picture.png").write_bytes(b"kept")
    with hub.serving({"user/tiny": old}, there) as (endpoint, _):
        done = online(endpoint, "upload", out, "user/tiny", **LOGGED_IN)
    assert done.returncode == 0, done.stderr
    assert contents(old) == contents(out) | {"picture.png": b"kept"}


def test_a_model_that_is_not_ours_is_asked_about(online, out, there):
    theirs = there / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text('{"theirs": 1}')
    (theirs / "model.safetensors").write_bytes(b"theirs")
    before = contents(theirs)
    with hub.serving({"user/theirs": theirs}, there) as (endpoint, _):
        asked = online(endpoint, "upload", out, "user/theirs", **LOGGED_IN)
        assert asked.returncode == 2
        assert "did not make" in asked.stderr
        assert "--yes" in asked.stderr
        assert contents(theirs) == before
        done = online(endpoint, "upload", out, "user/theirs", "--yes", **LOGGED_IN)
    assert done.returncode == 0, done.stderr
    assert contents(theirs) == contents(out)


REFUSED = {
    "no token": ("user/tiny", {}, "hf auth login"),
    "a wrong token": ("user/tiny", {"HF_TOKEN": "hf_wrong"}, "does not take the token"),
    "no right": ("other/tiny", LOGGED_IN, "may not write there"),
    "no repo id": ("tiny", LOGGED_IN, "user/name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line(online, out, there, case):
    repo, env, message = REFUSED[case]
    before = contents(out)
    with hub.serving({}, there) as (endpoint, _):
        done = online(endpoint, "upload", out, repo, "--no-load", **env)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert contents(out) == before
    assert not list(there.iterdir())


def test_no_network(online, out):
    before = contents(out)
    done = online("http://127.0.0.1:9", "upload", out, "user/tiny", "--no-load", **LOGGED_IN)
    assert done.returncode == 2
    assert "cannot be reached" in done.stderr
    assert done.stderr.count("\n") == 1
    assert contents(out) == before


def test_a_damaged_repo_is_not_sent(online, out, there):
    shard = next(out.glob("model*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with hub.serving({}, there) as (endpoint, log):
        done = online(endpoint, "upload", out, "user/tiny", **LOGGED_IN)
    assert done.returncode == 1
    assert "FAIL  hashes" in done.stdout
    assert not any(method in ("PUT", "POST") for method, _, _ in log)
