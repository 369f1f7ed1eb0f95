"""Uploads through the Hub's real client, against a stand-in on loopback."""

import json
import shutil

import mlx_lm
import pytest

from quantkit.checkpoint.source import open_source
from quantkit.planning.recipe import load_recipe, plan_by_recipe
from tests.support import hub
from tests.support.repo import write_repo

LOGGED_IN = {"HF_TOKEN": hub.TOKEN}


@pytest.fixture(scope="module")
def written(tmp_path_factory, checkpoint):
    source = open_source(str(checkpoint))
    plan = plan_by_recipe(source.inventory, load_recipe("mxfp4-q8"))
    out = tmp_path_factory.mktemp("repo") / "out"
    write_repo(source, plan, out, shard_bytes=300_000)
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
    with hub.serving({}, there) as (endpoint, log):
        shown = online(endpoint, "upload", out, "user/tiny", "--dry-run", "--json")
        done = online(endpoint, "upload", out, "user/tiny", **LOGGED_IN)
        assert done.returncode == 0, done.stderr
    assert [path for method, path, _ in log if method == "NEW"] == ["user/tiny public"]
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


def test_private_on_a_branch_with_a_message(online, out, there):
    options = ("--private", "--revision", "exp", "-m", "First of all", "--no-load")
    with hub.serving({}, there) as (endpoint, log):
        for _ in range(2):  # again: it is there already, and private
            done = online(endpoint, "upload", out, "user/tiny", *options, **LOGGED_IN)
            assert done.returncode == 0, done.stderr
    said = [(method, path) for method, path, _ in log if method in ("NEW", "COMMIT")]
    assert said[:2] == [("NEW", "user/tiny private"), ("COMMIT", "exp: First of all")]
    assert all(path == "exp: First of all" for _, path in said[1:])
    assert any(path.endswith("/branch/exp") for _, path, _ in log)


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
        assert "run the same command to resume" in failed.stderr
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


def test_what_mlx_lm_does_not_read_is_left(online, out, there):
    """A folder whose name begins as shards' names do is none of ours."""
    old = there / "tiny"
    (old / "model-lora").mkdir(parents=True)
    (old / "quantkit.json").write_text("{}")
    (old / "model-lora" / "adapter.safetensors").write_bytes(b"kept")
    with hub.serving({"user/tiny": old}, there) as (endpoint, _):
        done = online(endpoint, "upload", out, "user/tiny", "--no-load", **LOGGED_IN)
    assert done.returncode == 0, done.stderr
    assert (old / "model-lora" / "adapter.safetensors").read_bytes() == b"kept"


def test_a_public_repo_does_not_turn_private(online, out, there):
    (there / "tiny").mkdir()
    with hub.serving({"user/tiny": there / "tiny"}, there) as (endpoint, _):
        done = online(endpoint, "upload", out, "user/tiny", "--private", "--no-load", **LOGGED_IN)
    assert done.returncode == 2
    assert "exists and is public" in done.stderr
    assert not list((there / "tiny").iterdir())


def test_an_edited_card_is_sent_as_it_is(online, out, there):
    (out / "README.md").write_text("Mine.")
    with hub.serving({}, there) as (endpoint, _):
        done = online(endpoint, "upload", out, "user/tiny", "--no-load", **LOGGED_IN)
    assert done.returncode == 0, done.stderr
    assert (there / "tiny" / "README.md").read_text() == "Mine."
    assert "README.md was edited by hand" in done.stderr
    assert contents(there / "tiny") == contents(out)


REFUSED = {
    "no token": ("user/tiny", {}, "hf auth login"),
    "a wrong token": ("user/tiny", {"HF_TOKEN": "hf_wrong"}, "rejects the token"),
    "a token that reads": ("user/tiny", {"HF_TOKEN": hub.READER}, "may only read"),
    "no right": ("other/tiny", LOGGED_IN, "may not write there"),
    "no right to what is there": ("other/theirs", LOGGED_IN, "may not write there"),
    "no right of an organization's": ("org/tiny", LOGGED_IN, "You don't have the rights"),
    "no repo id": ("tiny", LOGGED_IN, "user/name"),
    "not the Hub's kind of name": ("user/..", LOGGED_IN, "not a repo on the Hub"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line(online, out, there, tmp_path, case):
    repo, env, message = REFUSED[case]
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "quantkit.json").write_text("{}")
    before = contents(out)
    with hub.serving({"other/theirs": theirs}, there) as (endpoint, _):
        done = online(endpoint, "upload", out, repo, "--no-load", "--json", **env)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert contents(out) == before
    assert not list(there.iterdir())


def test_names_are_looked_at_before_a_dry_run(cli, out):
    for repo in ("user/..", "user/a--b", "user/né", "user/" + "x" * 120):
        done = cli("upload", out, repo, "--dry-run")
        assert done.exit_code == 2
        assert "not a repo on the Hub" in done.stderr


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
        said = online(endpoint, "upload", out, "user/tiny", "--json", **LOGGED_IN)
    assert done.returncode == said.returncode == 1
    assert "FAIL  hashes" in done.stdout
    assert not json.loads(said.stdout)["ok"]
    assert not any(method in ("PUT", "POST") for method, _, _ in log)
