"""Rewrites that are killed."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.killing import WATCH

MOMENTS = 6
SCRIPT = f"""{WATCH}
source, out, moment = sys.argv[1:4]
seen = watch(out, int(moment))
from pathlib import Path
from quantkit.planning.recipe import load_recipe, plan_by_recipe
from tests.support.repo import write_repo
from quantkit.checkpoint.source import open_source
opened = open_source(source)
plan = plan_by_recipe(opened.inventory, load_recipe("moringlabs-3.6bit"))
write_repo(opened, plan, Path(out), shard_bytes=50_000, force=len(sys.argv) > 4)
print(seen[0])
"""


def run(source: Path, out: Path, moment: int, *force: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, str(source), str(out), str(moment), *force]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def hashes(repo: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(repo.iterdir())}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, checkpoint):
    """(the repo of an undisturbed run, how many things it does to the disk)"""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = run(checkpoint, out, 0)
    assert done.returncode == 0, done.stderr
    return out, int(done.stdout)


@pytest.mark.parametrize("part", range(1, MOMENTS + 1))
def test_killed_and_run_again(tmp_path, checkpoint, undisturbed, part):
    expected, steps = undisturbed
    out = tmp_path / "out"
    killed = run(checkpoint, out, steps * part // MOMENTS)
    assert killed.returncode == -signal.SIGKILL
    if out.exists():  # it was killed after the last rename: then all is there
        assert hashes(out) == hashes(expected)
    again = run(checkpoint, out, 0)
    assert again.returncode == 0, again.stderr
    assert hashes(out) == hashes(expected)
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_a_replaced_repo_is_never_lost(tmp_path, checkpoint):
    """Killed at any step of the last renames, either the old repo or the new one is there."""
    steps = int(run(checkpoint, tmp_path / "count", 0).stdout)
    for back in range(0, 20, 2):
        out = tmp_path / f"out{back}"
        out.mkdir()
        (out / "old").write_text("old")
        run(checkpoint, out, steps - back, "force")
        partial = out.with_name(f"{out.name}.partial")
        survivors = [out / "old", partial / "replaced" / "old", out / "config.json"]
        assert any(path.exists() for path in survivors)
        again = run(checkpoint, out, 0, "force")
        assert again.returncode == 0, again.stderr
        assert (out / "config.json").exists()
        assert not partial.exists()


def test_leavings_of_a_replaced_repo_do_not_block_the_next(tmp_path, checkpoint):
    """Killed while the replaced repo was being removed; then something else is asked for."""
    out = tmp_path / "out"
    assert run(checkpoint, out, 0).returncode == 0
    left = tmp_path / "out.partial"
    (left / "replaced").mkdir(parents=True)
    (left / "replaced" / "old").write_text("old")
    (left / "lock").write_text("quantkit\n")
    other = tiny.write_gpt_oss(tmp_path / "src", lambda values: values["lm_head.weight"].fill(0))
    done = run(other, out, 0, "force")
    assert done.returncode == 0, done.stderr
    assert not left.exists()


def test_another_run_s_unfinished_work_is_kept(tmp_path, checkpoint, undisturbed):
    """Asking again for what is there leaves an unfinished rewrite of something else alone."""
    _, steps = undisturbed
    source, out = tiny.write_gpt_oss(tmp_path / "src"), tmp_path / "out"
    other = tiny.write_gpt_oss(tmp_path / "other", lambda values: values["lm_head.weight"].fill(0))
    assert run(source, out, 0).returncode == 0
    run(other, out, steps // 2, "force")
    staged = sorted((tmp_path / "out.partial" / "repo").iterdir())
    assert staged
    assert run(source, out, 0).returncode == 0
    assert sorted((tmp_path / "out.partial" / "repo").iterdir()) == staged


def test_a_source_that_was_only_touched_is_the_same(tmp_path, undisturbed):
    _, steps = undisturbed
    source, out = tiny.write_gpt_oss(tmp_path / "src"), tmp_path / "out"
    run(source, out, steps // 2)
    for path in source.iterdir():
        path.touch()
    assert run(source, out, 0).returncode == 0


def test_a_source_replaced_with_its_times_kept(tmp_path, undisturbed):
    _, steps = undisturbed
    source, out = tiny.write_gpt_oss(tmp_path / "src"), tmp_path / "out"
    times = {p: p.stat().st_mtime_ns for p in source.iterdir()}
    run(source, out, steps // 2)
    tiny.write_gpt_oss(
        source, lambda values: values["model.layers.2.self_attn.k_proj.weight"].fill(0)
    )
    for path, time in times.items():
        os.utime(path, ns=(time, time))
    assert "with another source file model-0000" in run(source, out, 0).stderr


def test_a_shard_harmed_meanwhile_is_written_again(tmp_path, checkpoint, undisturbed):
    expected, steps = undisturbed
    out = tmp_path / "out"
    run(checkpoint, out, steps // 2)
    shard = min((tmp_path / "out.partial" / "repo").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert run(checkpoint, out, 0).returncode == 0
    assert hashes(out) == hashes(expected)


@pytest.mark.parametrize("mark", ["", "mine"])
def test_a_lock_of_others_makes_no_folder_ours(tmp_path, checkpoint, mark):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "lock").write_text(mark)
    (partial / "thesis").write_text("years of work")
    done = run(checkpoint, tmp_path / "out", 0, "force")
    assert "exists, but quantkit did not make it" in done.stderr
    assert (partial / "thesis").read_text() == "years of work"


def test_notes_in_the_staging_folder_are_kept(tmp_path, checkpoint, undisturbed):
    _, steps = undisturbed
    run(checkpoint, tmp_path / "out", steps // 2)
    (tmp_path / "out.partial" / "notes").write_text("mine")
    assert run(checkpoint, tmp_path / "out", 0).returncode == 0
    assert [p.name for p in (tmp_path / "out.partial").iterdir()] == ["notes"]


def test_a_source_where_the_staging_must_go(tmp_path):
    source = tiny.write_gpt_oss(tmp_path / "out.partial")
    before = hashes(source)
    assert "which must not be replaced" in run(source, tmp_path / "out", 0, "force").stderr
    assert hashes(source) == before


def test_complete_shards_are_not_written_again(tmp_path, checkpoint, undisturbed):
    _, steps = undisturbed
    out = tmp_path / "out"
    run(checkpoint, out, steps // 2)
    staged = out.with_name("out.partial") / "repo"
    before = {p.name: p.stat().st_mtime_ns for p in staged.glob("*.safetensors")}
    assert len(before) > 1
    assert run(checkpoint, out, 0).returncode == 0
    after = {p.name: p.stat().st_mtime_ns for p in out.glob("*.safetensors")}
    untouched = [name for name in before if after[name] == before[name]]
    assert untouched
    assert len(untouched) >= len(before) - 1  # the last one may not have been recorded yet


def test_a_changed_input_is_refused_by_name(tmp_path, undisturbed):
    _, steps = undisturbed
    source, out = tiny.write_gpt_oss(tmp_path / "src"), tmp_path / "out"
    run(source, out, steps // 2)
    tiny.write_gpt_oss(source, lambda values: values["lm_head.weight"].fill(0))
    again = run(source, out, 0)
    assert (
        "out.partial: holds an unfinished rewrite with another source file model-0000"
        in again.stderr
    )
    assert run(source, out, 0, "force").returncode == 0
    assert not out.with_name("out.partial").exists()


def test_two_at_once(tmp_path, checkpoint):
    import fcntl

    partial = tmp_path / "out.partial"
    partial.mkdir()
    with open(partial / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = run(checkpoint, tmp_path / "out", 0)
    assert "out.partial: another quantkit is writing there now" in second.stderr
