"""Repos without some of their experts: written, checked, judged, and loaded by stock mlx-lm."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from quantkit.artifacts.experts import Pruning, expert_blocks
from quantkit.backend import mx
from quantkit.checkpoint.source import open_source
from quantkit.formats.codec import encode
from quantkit.formats.tiers import parse_tier
from quantkit.planning.plan import make_plan
from quantkit.storage.json_files import dump_json
from quantkit.streaming.layer_runner import StreamingModel
from tests.support import standin
from tests.support.families import FAMILIES, tensors, write_from_model
from tests.support.killing import WATCH
from tests.support.repo import write_repo

FEW = ("--tokens", 256, "--quantizer-tokens", 512)
SCRIPT = f"""{WATCH}
plan, source, out, moment = sys.argv[1:5]
seen = watch(out, int(moment))
from quantkit.cli.main import main
sys.argv = ["quantkit", "quantize", source, "--plan", plan, "-o", out, "--quantizer-tokens", "512"]
try:
    main()
finally:
    print(seen[0])
"""


@pytest.fixture(scope="module")
def run():
    from quantkit.cli.main import app

    def run(*arguments):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        return done.stdout

    return run


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return standin.write_own(tmp_path_factory.mktemp("source") / "gpt-oss")


@pytest.fixture(scope="module")
def out(run, source):
    out = source.with_name("out")
    run("quantize", source, "-b", "3.4bpw", "--experts", "5", "-o", out, *FEW)
    return out


def plan_of(source, tier, count=3, seed=0):
    """All experts in `tier`, a random choice of them kept."""
    rng = np.random.default_rng(seed)
    inventory = source.inventory
    kept = {
        block: tuple(sorted(rng.permutation(inventory.experts)[:count].tolist()))
        for block in expert_blocks(inventory)
    }
    tiers = {
        w.name: parse_tier(tier if w.role.startswith("expert") else "native")
        for w in inventory.weights
    }
    pruning = Pruning(inventory.experts, kept, inventory.parameters)
    return make_plan(inventory, tiers, "chosen by a test", pruning)


def test_from_nothing_to_a_repo_that_is_checked(run, source, out):
    checks = json.loads(run("verify", out, "--json"))
    assert all(check["ok"] is not False for check in checks["checks"])
    assert "experts as planned" in {check["name"] for check in checks["checks"]}
    config = json.loads((out / "config.json").read_text())
    assert config["num_local_experts"] == 5
    assert config["num_experts_per_tok"] == 4
    report = json.loads((out / "quantkit.json").read_text())
    pruning = report["plan"]["pruning"]
    assert pruning["experts"] == 8
    assert {len(kept) for kept in pruning["kept"].values()} == {5}
    whole = open_source(str(source)).inventory
    stored = open_source(str(out), quantized=True).inventory
    assert report["plan"]["parameters"] == whole.parameters
    assert report["plan"]["kept_parameters"] == stored.parameters < whole.parameters
    assert report["plan"]["total_bytes"] == stored.total_bytes
    assert report["plan"]["bits_per_weight"] == 8 * stored.total_bytes / whole.parameters <= 3.4
    for shown in (run("report", out), (out / "README.md").read_text()):
        assert "5 of 8 kept in every layer" in shown
    card = (out / "README.md").read_text()
    assert {point["recipe"] for point in report["frontier"]} > {None, "mxfp4-q8"}
    assert "![KL divergence against size](frontier.png)" in card
    for block, kept in pruning["kept"].items():
        removed = ", ".join(str(n) for n in range(8) if n not in kept)
        assert f"| `{block}` | {removed} |" in card


def test_the_judge_compares_it_to_the_whole_model(run, source, out):
    found = json.loads(run("compare", source, out, *FEW[:2], "--seed", 3, "--json"))
    (fidelity,) = found["results"]
    assert 0 < fidelity["kl_mean"] < 20
    whole = open_source(str(source)).inventory.parameters
    stored = open_source(str(out), quantized=True).inventory.total_bytes
    assert fidelity["bits_per_weight"] == 8 * stored / whole


def test_stock_mlx_lm_loads_it_and_generates(out):
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(out))
    assert model.args.num_local_experts == 5
    model.set_dtype(mx.float32)
    steps = list(mlx_lm.stream_generate(model, tokenizer, "The", max_tokens=4))
    assert steps
    assert not any(mx.any(mx.isnan(step.logprobs)).item() for step in steps)


def test_the_bytes_are_those_of_the_kept_experts(source, tmp_path):
    opened = open_source(str(source))
    plan = plan_of(opened, "q4g64", 5)
    write_repo(opened, plan, tmp_path / "out")
    stored, whole = tensors(tmp_path / "out"), StreamingModel(opened)
    for block, kept in plan.pruning.kept.items():
        places = mx.array(kept)
        for projection in ("gate_proj", "up_proj", "down_proj"):
            name = f"{block}.experts.{projection}"
            values = whole.values(name)[places].astype(mx.bfloat16)
            expected = encode(values, parse_tier("q4g64"))
            for end, tensor in zip(("weight", "scales", "biases"), expected, strict=True):
                assert mx.array_equal(stored[f"{name}.{end}"], tensor)
            bias = whole.parameter(f"{name}.bias")[places]
            assert mx.array_equal(stored[f"{name}.bias"].astype(mx.float32), bias)
        for end in ("weight", "bias"):
            rows = whole.parameter(f"{block}.router.{end}")[places]
            assert mx.array_equal(stored[f"{block}.router.{end}"].astype(mx.float32), rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(run, tmp_path, family):
    opened = open_source(str(write_from_model(tmp_path / "src", FAMILIES[family])))
    write_repo(opened, plan_of(opened, "q4g64"), tmp_path / "out")
    checks = json.loads(run("verify", tmp_path / "out", "--json"))["checks"]
    assert all(check["ok"] is not False for check in checks), checks
    assert {check["name"]: check["ok"] for check in checks}["stock mlx-lm loads it"]


def test_one_bit(run, source, tmp_path):
    opened = open_source(str(source))
    write_repo(opened, plan_of(opened, "q1g64", 5), tmp_path / "out")
    assert '"mlx>=0.32.4"' in (tmp_path / "out" / "README.md").read_text()
    assert "needs             mlx 0.32.4 or later" in run("report", tmp_path / "out")
    checks = json.loads(run("verify", tmp_path / "out", "--json"))["checks"]
    assert all(check["ok"] is not False for check in checks), checks


def test_tuning_aims_at_the_whole_model(source, tmp_path, monkeypatch):
    """Its target is the output of all experts, which the remaining ones cannot reach."""
    from dataclasses import replace

    from quantkit.quantizers import scale_tuning

    targets = []
    native = scale_tuning.ScaleTuner._native

    def spy(self, key, tokens):
        targets.append((self._native_model.source.inventory.experts, native(self, key, tokens)))
        return targets[-1][1]

    monkeypatch.setattr(scale_tuning.ScaleTuner, "_native", spy)
    opened = open_source(str(source))
    plan = replace(plan_of(opened, "q3g64", 5), quantizer="search", tuning_steps=1)
    write_repo(opened, plan, tmp_path / "out", quantizer_tokens=512)
    assert targets
    assert {experts for experts, _ in targets} == {8}


def test_a_config_of_more_experts_is_seen(out, tmp_path, cli):
    repo = tmp_path / "out"
    shutil.copytree(out, repo)
    config = json.loads((repo / "config.json").read_text())
    (repo / "config.json").write_text(json.dumps({**config, "num_local_experts": 8}))
    refused = cli("verify", repo)
    assert refused.exit_code != 0
    assert "experts as planned" in refused.stdout
    assert refused.stdout.count("FAIL") >= 1


def test_an_edited_list_of_experts_is_seen(out, tmp_path, cli):
    repo = tmp_path / "out"
    shutil.copytree(out, repo)
    report = json.loads((repo / "quantkit.json").read_text())
    kept = report["plan"]["pruning"]["kept"]
    block = min(kept)
    kept[block] = next(n for n in ([0, 1, 2, 3, 4], [1, 2, 3, 4, 5]) if n != kept[block])
    (repo / "quantkit.json").write_text(json.dumps(report))
    refused = cli("verify", repo, "--no-load")
    assert refused.exit_code == 1
    assert "lists of experts were edited" in refused.stdout


def hashes(repo):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(repo.iterdir())}


def test_killed_and_resumed(source, tmp_path):
    opened = open_source(str(source))
    plan = tmp_path / "plan.json"
    made = plan_of(opened, "q3g64", 5).to_json()
    plan.write_text(dump_json({**made, "quantizer": "gptq"}))

    def quantize(out, moment):
        command = [sys.executable, "-c", SCRIPT, plan, source, out, str(moment)]
        env = {**os.environ, "COLUMNS": "200"}
        return subprocess.run(
            list(map(str, command)), capture_output=True, text=True, check=False, env=env
        )

    whole = quantize(tmp_path / "whole", 0)
    assert (tmp_path / "whole" / "config.json").is_file(), whole.stderr
    steps = int(whole.stdout.splitlines()[-1])
    assert steps > 20
    out = tmp_path / "out"
    killed = quantize(out, int(steps * 0.6))
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    quantize(out, 0)
    assert hashes(out).keys() == hashes(tmp_path / "whole").keys()
    for name, sha256 in hashes(tmp_path / "whole").items():
        if name not in ("README.md", "quantkit.json"):  # which state the command line
            assert hashes(out)[name] == sha256, name


def test_refined(run, source, out):
    """The removal is measured, too, and its prediction corrected."""
    from quantkit.jobs.planning import PlanRequest, choose_plan
    from quantkit.jobs.refine import refine
    from quantkit.sensitivity.store import load_profile

    opened = open_source(str(source))
    profile = load_profile(str(out.with_name("out-profile")), opened.inventory)
    request = PlanRequest(budget="3.4bpw", experts="5", quantizer="rtn")
    budget, constraints = request.parsed_budget(opened), request.constraints(opened)
    measured = refine(opened, profile, budget, constraints)
    assert len(measured) >= 1
    assert all(one.kl > 0 and one.plan.pruning.count == 5 for one in measured)
    assert any(
        one.profile.removal_costs[5] != pytest.approx(profile.removal_costs[5]) for one in measured
    )
    refined = PlanRequest(budget="3.4bpw", experts="5", quantizer="rtn", refine=1)
    assert choose_plan(opened, refined, profile).plan.measured_kl is not None
