"""Homes, caches and folders for temporary files that are missing or may not be written."""

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.storage.paths import cache_folder, home_folder
from tests.support import tiny
from tests.support.text import rows

FEW = ("--tokens", "64", "--sequence-length", "16")

NOT_WRITABLE = "/proc"  # not even for root


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return rows(tmp_path_factory.mktemp("text") / "text.jsonl", seed=0, count=80, length=30)


@pytest.fixture
def run(tmp_path):
    def run(*arguments, **env):
        inherited = {k: v for k, v in os.environ.items() if k not in ("QUANTKIT_CACHE", "HF_HOME")}
        done = subprocess.run(
            [sys.executable, "-m", "quantkit", *map(str, arguments)],
            cwd=tmp_path,
            env={k: v for k, v in {**inherited, **env}.items() if v is not None},
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


def test_a_home_that_cannot_be_written(run, checkpoint, quant, text):
    """Data sets and the native model's output are not kept, which is said; all else goes on."""
    options = (checkpoint, quant, "--text", text, *FEW)
    done = run("compare", *options, HOME=NOT_WRITABLE)
    assert done.returncode == 0, done.stderr
    assert "top-1 agreement" in done.stdout
    notes = [line for line in done.stderr.splitlines() if "is not cached" in line]
    assert len(notes) == 1
    assert notes[0].startswith("note: the native model's output is not cached")
    assert "Set HF_HOME to a writable folder" in done.stderr


def test_a_folder_for_temporary_files_that_is_missing(run, quant):
    done = run("verify", quant, TMPDIR="/nowhere/at/all")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 of 8 checks passed" in done.stdout


def test_a_cache_that_cannot_be_written_and_is_needed(run):
    done = run("inspect", "demo", HOME=NOT_WRITABLE)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Set QUANTKIT_CACHE to another folder" in done.stderr


@pytest.fixture
def nobody(monkeypatch):
    """No HOME, and a user number that the system has no entry for, as in containers."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "QUANTKIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_without_a_home(nobody, cli, checkpoint, tmp_path):
    assert home_folder() is None
    assert cache_folder().name == f"quantkit-{os.getuid()}"
    done = cli("quantize", checkpoint, "-r", "mxfp4-q8", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output


OUTPUTS = {
    "quantize": ("quantize", "SRC", "-r", "mxfp4-q8", "--output=~/made"),
    "plan": ("plan", "SRC", "-r", "mxfp4-q8", "--output=~/made"),
    "profile": ("profile", "SRC", "--output=~/made", "--tiers", "q8g64", "--calibration", "TEXT", *FEW),
}  # fmt: skip


@pytest.mark.parametrize("case", OUTPUTS)
def test_a_tilde_that_the_shell_left(cli, checkpoint, text, tmp_path, monkeypatch, case):
    """`--output=~/x` reaches the command as it is written."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    done = cli(*[{"SRC": checkpoint, "TEXT": text}.get(a, a) for a in OUTPUTS[case]])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "home" / "made").exists()
    assert not list(Path.cwd().iterdir())


REFUSED = {
    "no such text": ("--calibration", "nowhere.jsonl"),
    "too long a sequence": ("--sequence-length", "1000000"),
    "no text": ("--calibration", "EMPTY"),
    "no such tier": ("--tiers", "q7g64"),
    "no such method": ("--method", "guess"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_profile_leaves_nothing(cli, checkpoint, tmp_path, case):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    options = [{"EMPTY": empty}.get(a, a) for a in REFUSED[case]]
    done = cli("profile", checkpoint, "-o", tmp_path / "new" / "profile", *options)
    assert done.exit_code == 2, done.output
    assert sorted(tmp_path.iterdir()) == [empty]


def test_a_profile_refused_once_the_model_is_built_leaves_nothing(
    cli, checkpoint, tmp_path, text, monkeypatch
):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    out = tmp_path / "new" / "profile"
    done = cli("profile", checkpoint, "-o", out, "--calibration", text, *FEW, "--tiers", "q8g64")
    assert done.exit_code == 2, done.output
    assert "0.00 GB free" in done.stderr
    assert not list(tmp_path.iterdir())


CODE = """
from transformers import PreTrainedTokenizerFast
print("ITS CODE RAN")
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """A checkpoint whose tokenizer is Python code of its own."""
    folder = tiny.write_gpt_oss(tmp_path_factory.mktemp("coded") / "src")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["tokenizer_class"]
    auto_map = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    path.write_text(json.dumps({**config, "auto_map": auto_map, "tokenizer_class": "OwnTokenizer"}))
    (folder / "tokenization_own.py").write_text(CODE)
    return folder


def test_code_of_a_tokenizer_is_not_run_unasked(run, coded, text, tmp_path):
    command = ("profile", coded, "-o", "p", "--calibration", text, *FEW, "--tiers", "q8g64")
    env = {"HF_HOME": str(tmp_path / "hf")}
    refused = run(*command, **env)
    assert refused.returncode == 2
    assert "needs to run Python code of the repo" in refused.stderr
    assert "--trust-remote-code" in refused.stderr
    assert "ITS CODE RAN" not in refused.stdout + refused.stderr
    trusted = run(*command, "--trust-remote-code", **env)
    assert trusted.returncode == 0, trusted.stderr
    assert "ITS CODE RAN" in trusted.stdout


def test_every_command_that_reads_a_tokenizer_can_trust_it(cli):
    reading = ("profile", "quantize", "compare", "verify", "bench", "upload", "generate", "chat")
    for command in (*reading, "serve"):
        assert "--trust-remote-code" in cli(command, "--help-all").output, command
