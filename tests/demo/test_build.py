"""The demo model: a gpt-oss that speaks."""

import json
import signal
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest

from quantkit.backend import mx
from quantkit.checkpoint.source import file_hashes, open_source
from quantkit.demo import llama
from quantkit.demo.build import build
from quantkit.demo.smollm2 import SmolLM2, gguf_path
from quantkit.errors import SourceError
from quantkit.evaluation.verify import verify
from quantkit.formats.codec import fake_quantize
from quantkit.formats.tiers import parse_tier
from quantkit.planning.recipe import load_recipe, plan_by_recipe
from quantkit.publish.record import read_report
from quantkit.quantizers.search import search
from quantkit.streaming.layer_runner import StreamingModel


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, demo):
    """The demo model as `quantkit demo` leaves it, and what the command printed."""
    from typer.testing import CliRunner

    from quantkit.cli.main import app

    out = tmp_path_factory.mktemp("demo") / "out"
    return out, CliRunner().invoke(app, ["demo", "-o", str(out), "-r", "mxfp4-q8"])


def test_the_demo_ends_with_its_report_and_answer(quantized):
    _, result = quantized
    assert result.exit_code == 0, result.output
    assert "bits per weight   5.7" in result.stdout
    report, _, answer = result.stdout.partition("> What is the capital of France?")
    assert "KL mean" in report
    assert "Paris" in answer


@pytest.mark.slow
def test_the_demo_runs_the_whole_job(tmp_path):
    """Profile, budget, calibrated quantizer, report, comparison and answer."""
    command = [sys.executable, "-m", "quantkit", "demo", "-o", tmp_path / "out", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    result = json.loads(done.stdout)
    assert result["report"]["plan"]["quantizer"] == "gptq"
    assert result["report"]["bits_per_weight"] <= 4.25
    assert (tmp_path / "out-profile" / "profile.json").is_file()
    assert result["fidelity"]["kl_mean"] < 0.1
    assert "Paris" in result["answer"]


def test_the_quantized_demo_verifies(quantized):
    out, _ = quantized
    checks = list(verify(out, read_report(out), load=False))
    assert not any(check.ok is False for check in checks), checks


def test_every_tensor_is_what_mlx_lm_convert_writes(tmp_path, demo, quantized):
    from mlx_lm import convert

    convert(str(demo), str(tmp_path / "theirs"), quantize=True, q_bits=8, q_group_size=64)
    theirs = {k: v for p in (tmp_path / "theirs").glob("*.safetensors") for k, v in mx.load(str(p)).items()}  # fmt: skip
    ours = {k: v for p in quantized[0].glob("*.safetensors") for k, v in mx.load(str(p)).items()}
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype
        assert mx.array_equal(ours[name], expected), name


@pytest.mark.slow
@pytest.mark.parametrize("part", [0.05, 0.15, 0.25, 0.35, 0.5])
def test_killed_in_the_middle_of_a_shard(tmp_path, demo, quantized, part):
    """kill -9 when that part of all bytes is on disk, then the same command again."""
    out, staged = tmp_path / "out", tmp_path / "out.partial" / "repo"
    command = [sys.executable, "-m", "quantkit", "quantize", str(demo), "-o", str(out)]
    command += ["-r", "mxfp4-q8", "--shard-size", "60MB"]
    whole = read_report(quantized[0]).total_bytes
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        written = 0
        with suppress(FileNotFoundError):  # a shard is renamed while we look
            written = sum(p.stat().st_size for p in staged.glob("model*"))
        if written >= part * whole:
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    assert subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0
    command[command.index(str(out))] = str(tmp_path / "undisturbed")
    assert subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0
    for path in sorted((tmp_path / "undisturbed").iterdir()):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_it_is_a_published_layout(demo):
    source = open_source(str(demo))
    assert source.inventory.model_type == "gpt_oss"
    assert len(source.checkpoint.files) == 2
    assert {w.storage for w in source.inventory.weights if w.role.startswith("expert")} == {"mxfp4"}
    assert json.loads((demo / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"  # fmt: skip


def test_building_is_deterministic(tmp_path, demo):
    (tmp_path / "again").mkdir()
    build(SmolLM2.open(gguf_path()), tmp_path / "again")
    again, first = open_source(str(tmp_path / "again")), open_source(str(demo))
    assert file_hashes(again) == file_hashes(first)
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "again" / name).read_bytes() == (demo / name).read_bytes()


def test_upcycling_keeps_the_function(demo):
    """A layer's experts compute the dense feed-forward, up to the rounding to MXFP4."""
    from mlx_lm.utils import load_model

    model = SmolLM2.open(gguf_path())
    gate, up, down = (
        mx.array(model.weight(f"blk.3.ffn_{n}.weight")) for n in ("gate", "up", "down")
    )
    x = mx.random.normal((1, 8, gate.shape[1]), key=mx.random.key(0))
    g = x @ gate.T
    dense = (g * mx.sigmoid(g) * (x @ up.T)) @ down.T
    upcycled, _ = load_model(demo, lazy=True)
    mixture = upcycled.model.layers[3].mlp(x)
    error = mx.square(mixture - dense).sum() / mx.square(dense).sum()
    assert error.item() < 0.05  # three roundings of 0.012 each, and the noise; a wrong map gives 1


def test_rotary_rows(demo):
    """Pairs side by side become halves: row 2i of a head goes to i, row 2i + 1 to half + i."""
    model = SmolLM2.open(gguf_path())
    stored, rotated = model.off_grid("blk.0.attn_k.weight"), model.rotary("blk.0.attn_k.weight", 3)
    assert np.array_equal(rotated[64 + 5], stored[64 + 10])
    assert np.array_equal(rotated[64 + 32 + 5], stored[64 + 11])


def test_no_plain_weight_lies_on_the_grid_of_its_file(demo):
    """The file's groups of 32 in 4 bits are q4g32, which a search would store without loss."""
    model, tier = SmolLM2.open(gguf_path()), parse_tier("q4g32")

    def error(values):
        weight = mx.array(values).astype(mx.bfloat16).astype(mx.float32)
        found = search(weight, mx.ones(weight.shape[-1]), tier, mx.bfloat16)
        nearest = mx.square(fake_quantize(weight, tier) - weight).sum()
        return (mx.square(found.dequantized(tier) - weight).sum() / nearest).item()

    assert error(model.weight("blk.3.attn_v.weight")) < 0.02
    source = open_source(str(demo))
    for name in ("q", "k", "v", "o"):
        values = StreamingModel(source).values(f"model.layers.3.self_attn.{name}_proj")
        assert error(values) > 0.5, name
    plain = dict(llama.tensors(model))
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        assert error(plain[f"model.layers.3.{name}.weight"]) > 0.5, name


def test_without_the_package(monkeypatch):
    monkeypatch.setattr("quantkit.demo.smollm2.PACKAGE", "llm-nonesuch")
    with pytest.raises(SourceError, match="needs the package llm-nonesuch: run `make env`"):
        gguf_path()


@pytest.mark.parametrize("recipe", ["moringlabs-3.6bit", "mxfp4-q4", "uniform-4"])
def test_recipes_fit_the_demo(demo, recipe):
    inventory = open_source(str(demo)).inventory
    plan = plan_by_recipe(inventory, load_recipe(recipe))
    assert plan.total_bytes < inventory.total_bytes


@pytest.mark.parametrize("name", ["demo", "demo-llama"])
def test_profile_of_the_demo_models(cli, tmp_path, name):
    """Experts and a dense, tied model: fewer bits lose more, summed over every role."""
    few = ("--tokens", "64", "--sequence-length", "32", "--tiers", "q6g64,q2g64")
    result = cli("profile", name, "-o", tmp_path / "p", *few, "--json")
    assert result.exit_code == 0, result.output
    losses: dict[str, dict[str, float]] = {}
    for weight in json.loads(result.stdout)["weights"]:
        for tier, loss in weight["costs"].items():
            row = losses.setdefault(weight["role"], {})
            row[tier] = row.get(tier, 0) + loss["kl"]
    for role, row in losses.items():
        assert row["q2g64"] > 4 * row.get("q6g64", 0), role
    assert set(losses) >= {"embedding", "q", "k", "v", "o"}
