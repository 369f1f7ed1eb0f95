"""The branches for a GPU, on the device at hand: weights stay packed, and mlx's kernels compute."""

import json
import sys

import pytest

import quantkit.backend
from quantkit.artifacts.sensitivity import SensitivityProfile
from tests.support.text import words


@pytest.fixture
def text(tmp_path):
    return words(tmp_path / "text.txt", 3)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    for name, module in list(sys.modules.items()):
        if name.startswith("quantkit") and hasattr(module, "on_cpu"):
            monkeypatch.setattr(module, "on_cpu", lambda: False)
    assert not quantkit.backend.on_cpu()


def costs(profile):
    saved = json.loads((profile / "profile.json").read_text())
    weights = SensitivityProfile.from_json(saved, "profile").weights
    return {(w.name, cost.tier): cost.kl for w in weights for cost in w.costs}


def test_the_main_job_gives_the_same(cli, checkpoint, text, tmp_path, request):
    def run(*command):
        done = cli(*command)
        assert done.exit_code == 0, done.output
        return done.stdout

    def job(folder):
        few = ("--calibration", text, "--tokens", 48, "--tiers", "q4g64,q3g64")
        run("profile", checkpoint, "-o", folder / "profile", *few)
        options = ("-b", "4.6bpw", "--tune", 1, "--quantizer-tokens", 512, "--calibration", text)
        out = ("--profile", folder / "profile", "-o", folder / "repo")
        run("quantize", checkpoint, *options, *out)
        return costs(folder / "profile")

    plain = job(tmp_path / "cpu")
    request.getfixturevalue("as_on_a_gpu")
    packed = job(tmp_path / "gpu")
    assert packed == pytest.approx(plain, rel=0.05, abs=1e-4)
    repos = (tmp_path / "cpu" / "repo", tmp_path / "gpu" / "repo")
    found = json.loads(run("compare", checkpoint, *repos, "--text", text, "--json"))["results"]
    assert found[1]["kl_mean"] == pytest.approx(found[0]["kl_mean"], rel=0.1)
    assert found[0]["kl_mean"] > 0.01
