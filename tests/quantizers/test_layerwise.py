"""Calibrated rounding of whole checkpoints: true to the inputs, repeatable, resumable."""

import hashlib
import itertools
import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import version

import numpy as np
import pytest

import quantkit
from quantkit.backend import mx
from quantkit.calibration.calibration_set import read_calibration_set
from quantkit.checkpoint.source import open_source
from quantkit.formats.tiers import parse_tier
from quantkit.quantizers import layerwise
from quantkit.quantizers.embeddings import drop_gradients, embedding_hessians
from quantkit.quantizers.hessians import objective
from quantkit.quantizers.scale_tuning import ScaleTuner
from quantkit.storage.work_dir import WorkDirectory
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.layer_trace import hooked
from quantkit.streaming.lm_head import (
    ChangedModel,
    divergence,
    divergence_gradient,
    label_gradients,
)
from quantkit.streaming.products import packed_product
from tests.support import tiny
from tests.support.families import LLAMA, write
from tests.support.reference import plainly_loaded
from tests.support.text import words

QUANTIZE = (sys.executable, "-m", "quantkit", "quantize")
pytestmark = pytest.mark.skipif(
    version("mlx-lm").startswith("0.31"), reason="mlx-lm differentiates its expert indices there"
)
FEW = ("--quantizer-tokens", "512")


def hashes(out):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.safetensors")}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return words(tmp_path_factory.mktemp("text") / "text.txt", 3)


@pytest.fixture(scope="module")
def rounded(checkpoint, text, tmp_path_factory):
    """The tiny gpt-oss in 3 bits, by gptq."""
    out = tmp_path_factory.mktemp("rounded") / "out"
    options = ("-r", "uniform-3", "--quantizer", "gptq", "--calibration", text, *FEW)
    subprocess.run([*QUANTIZE, checkpoint, "-o", out, *options], check=True, capture_output=True)
    return out


def test_stock_mlx_lm_loads_it(cli, rounded):
    result = cli("verify", rounded)
    assert result.exit_code == 0, result.output
    report = json.loads((rounded / "quantkit.json").read_text())
    assert report["plan"]["quantizer"] == "gptq"
    assert report["plan"]["calibration_texts"][0]["name"] == "text.txt"
    assert "gptq" in (rounded / "README.md").read_text()


def test_the_same_inputs_give_the_same_bytes(cli, checkpoint, text, rounded, tmp_path):
    options = ("-r", "uniform-3", "--quantizer", "gptq", "--calibration", text, *FEW)
    result = cli("quantize", checkpoint, "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert hashes(tmp_path / "out") == hashes(rounded)


@pytest.mark.parametrize("mark", ["quantized-1.npz", "quantized-4.npz"])
def test_a_killed_run_goes_on_at_its_layer(checkpoint, text, rounded, tmp_path, mark):
    options = ("-r", "uniform-3", "--quantizer", "gptq", "--calibration", text, *FEW)
    command = [*QUANTIZE, checkpoint, "-o", tmp_path / "out", *options]
    waits = tmp_path / "out.partial" / "work" / mark
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not waits.exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    first = tmp_path / "out.partial" / "work" / "quantized-0.npz"
    stamp = first.stat().st_mtime_ns
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and first.exists():
        try:
            assert first.stat().st_mtime_ns == stamp  # not rounded again
        except FileNotFoundError:
            break
        time.sleep(0.002)
    assert process.wait() == 0
    assert hashes(tmp_path / "out") == hashes(rounded)


def test_killed_while_gradients_are_taken(checkpoint, text, rounded, tmp_path):
    """The next run goes on at the layer that was reached."""
    options = ("-r", "uniform-3", "--quantizer", "gptq", "--calibration", text, *FEW)
    command = [*QUANTIZE, checkpoint, "-o", tmp_path / "out", *options]
    work = tmp_path / "out.partial" / "work"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (work / "e-g-2.npy").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (work / "quantized--1.npz").exists()
    stamp = (work / "e-h.npy").stat().st_mtime_ns
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (work / "quantized--1.npz").exists():
        with suppress(FileNotFoundError):
            assert (work / "e-h.npy").stat().st_mtime_ns == stamp
        assert not (work / "e-g-4.npy").exists()  # where a way back begins
        time.sleep(0.002)
    assert process.wait() == 0
    assert hashes(tmp_path / "out") == hashes(rounded)


GRANITE = {
    **LLAMA,
    "model_type": "granite",
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.2,
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 512,
}
EMBEDDINGS = {
    "apart": {**LLAMA, "tie_word_embeddings": False},
    "tied": LLAMA,
    "tied and scaled": GRANITE,
}


@pytest.mark.parametrize("case", EMBEDDINGS)
def test_an_embeddings_hessian_is_that_of_the_whole_model(tmp_path, case):
    """The gradient of the labels' log-likelihood, streamed, is the whole model's; a table that is
    the head as well has its inputs added. What the model multiplies both by counts."""
    config = EMBEDDINGS[case]
    folder = write(tmp_path / "src", config)
    model, whole = StreamingModel(quantkit.open_source(str(folder))), plainly_loaded(folder)
    tokens = mx.array(np.random.default_rng(0).integers(0, 64, (3, 16), np.int32))
    name = "model.embed_tokens"
    found = embedding_hessians(model, [name], tokens, WorkDirectory(tmp_path), lambda *_: None)[
        name
    ]
    levels = np.random.default_rng(0).random((1, *tokens.shape), np.float32)
    (at_h,) = label_gradients(model, model.run(tokens, lambda *_: None), mx.array(levels))

    def layers(rows):
        x = rows * config.get("embedding_multiplier", 1.0)
        for layer in whole.model.layers:
            x = layer(x, "causal", None)
        return x

    (h,), (g,) = mx.vjp(layers, [whole.model.embed_tokens(tokens)], [at_h])
    expected = g.reshape(-1, g.shape[-1]).T @ g.reshape(-1, g.shape[-1]) / tokens.size
    if config["tie_word_embeddings"]:
        x = whole.model.norm(h).reshape(-1, h.shape[-1]) / config.get("logits_scaling", 1.0)
        expected = expected + x.T @ x / tokens.size
    assert mx.allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.max().item()).item()
    drop_gradients(model, WorkDirectory(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_an_embedding_is_rounded_under_its_gradients(cli, checkpoint, text, rounded, tmp_path):
    options = ("-r", "uniform-3", "--quantizer", "rtn")
    assert cli("quantize", checkpoint, "-o", tmp_path / "rtn", *options).exit_code == 0
    source = quantkit.open_source(str(checkpoint))
    model, name = StreamingModel(source), "model.embed_tokens"
    tokens = mx.array(
        read_calibration_set(source.checkpoint, quantkit.CalibrationSpec(str(text), 512)).tokens
    )
    found = embedding_hessians(model, [name], tokens, WorkDirectory(tmp_path), lambda *_: None)
    losses = []
    for out in (tmp_path / "rtn", rounded):
        made = mx.load(str(out / "model.safetensors"))
        packed, s, b = (made[f"{name}.{part}"] for part in ("weight", "scales", "biases"))
        values = mx.dequantize(packed, s.astype(mx.float32), b.astype(mx.float32), 64, 3)
        weight = model.values(name).astype(mx.float32)
        losses.append(objective(weight[None], values[None], found[name][None]).item())
    assert losses[1] < 0.7 * losses[0]


def test_a_table_of_positions_is_no_head(cli, tmp_path, text):
    """GPT-2 has two tables; the one of the vocabulary is the head, the other is left to nearest."""
    from mlx.utils import tree_flatten
    from mlx_lm.models import gpt2

    config = {
        "model_type": "gpt2", "n_ctx": 256, "n_embd": 64, "n_head": 2, "n_layer": 2,
        "n_positions": 256, "layer_norm_epsilon": 1e-5, "vocab_size": 320, "eos_token_id": 1,
    }  # fmt: skip
    mx.random.seed(0)
    built = gpt2.Model(gpt2.ModelArgs.from_dict(config))
    values = {}
    for name, value in tree_flatten(built.parameters()):
        turned = name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and name.endswith("weight")
        value = (value.T if turned else value).astype(mx.bfloat16)
        values[name.removeprefix("model.")] = mx.contiguous(value)
    folder = tmp_path / "src"
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), values, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    tiny.write_tokenizer(folder, 320)
    more = ("--quantizer-tokens", 512, "--calibration", text, "--quantizer", "gptq")
    outs = [tmp_path / "rtn", tmp_path / "out"]
    assert cli("quantize", folder, "-r", "uniform-4", "-o", outs[0]).exit_code == 0
    made = cli("quantize", folder, "-r", "uniform-4", "-o", outs[1], *more, "--json")
    assert made.exit_code == 0, made.output
    before, after = (mx.load(str(out / "model.safetensors")) for out in outs)
    same = {n: mx.array_equal(before[n], after[n]).item() for n in before if n.endswith("weight")}
    assert same["model.wpe.weight"]
    assert not same["model.wte.weight"]


def test_another_text_does_not_go_on_from_it(cli, checkpoint, text, tmp_path):
    """What waits was rounded on other inputs."""
    options = ("-r", "uniform-3", "--quantizer", "gptq", *FEW, "-o", tmp_path / "out")
    command = [*QUANTIZE, checkpoint, *options, "--calibration", text]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    while (
        process.poll() is None
        and not (tmp_path / "out.partial" / "work" / "quantized-0.npz").exists()
    ):
        time.sleep(0.002)
    process.kill()
    process.wait()
    other = words(tmp_path / "other.txt", 4)
    result = cli("quantize", checkpoint, *options, "--calibration", other)
    assert result.exit_code == 2
    assert "another text for the quantizer" in result.stderr


@pytest.mark.parametrize("method", ["search", "gptq"])
def test_a_dense_model_and_its_outputs(cli, tmp_path, text, method):
    """Of a layer's own inputs the rounded weights give outputs nearer to the native ones."""
    source = write(tmp_path / "src", LLAMA)
    outs = {}
    for quantizer, more in (("rtn", ()), (method, ("--calibration", text, *FEW))):
        outs[quantizer] = tmp_path / quantizer
        options = ("-r", "uniform-3", "--quantizer", quantizer, *more)
        result = cli("quantize", source, "-o", outs[quantizer], *options)
        assert result.exit_code == 0, result.output
    assert cli("verify", outs[method]).exit_code == 0
    opened = quantkit.open_source(str(source))
    native = StreamingModel(opened)
    tokens = mx.array(
        read_calibration_set(opened.checkpoint, quantkit.CalibrationSpec(text, 512)).tokens
    )
    plain = plainly_loaded(source)
    x = plain.model.layers[0].input_layernorm(plain.model.embed_tokens(tokens))
    x = x.reshape(-1, x.shape[-1])
    hessian = (x.T @ x)[None]
    name = "model.layers.0.self_attn.q_proj"
    losses = {}
    for quantizer, out in outs.items():
        made = mx.load(str(out / "model.safetensors"))
        packed, s, b = (made[f"{name}.{part}"] for part in ("weight", "scales", "biases"))
        values = mx.dequantize(packed, s.astype(mx.float32), b.astype(mx.float32), 64, 3)
        weight = native.values(name).astype(mx.float32)
        losses[quantizer] = objective(weight[None], values[None], hessian).item()
    assert losses[method] < 0.9 * losses["rtn"]


def test_errors_propagate_within_a_block(checkpoint, text, rounded, tmp_path, monkeypatch, cli):
    """The experts' outputs are nearer to the native ones than if down knew nothing of the errors of
    gate and up."""
    monkeypatch.setattr(layerwise, "_BLOCKS", ())
    options = ("-r", "uniform-3", "--quantizer", "gptq", "--calibration", text, *FEW)
    assert cli("quantize", checkpoint, "-o", tmp_path / "out", *options).exit_code == 0
    source = quantkit.open_source(str(checkpoint))
    model, calls = StreamingModel(source), []
    spec = quantkit.CalibrationSpec(str(text), 512)
    tokens = mx.array(read_calibration_set(source.checkpoint, spec).tokens)
    model.run(tokens, lambda _n, call, _y: calls.append(call))
    for number, layer in enumerate(model.layers):
        names = [n for n in model.weights if n.startswith(f"{layer.path}.mlp.experts")]
        errors = []
        with hooked(layer, names) as module:
            native = module.run(calls[number])
            for out in (tmp_path / "out", rounded):
                made = mx.load(str(out / "model.safetensors"))
                products = {
                    name: packed_product(
                        [made[f"{name}.{part}"] for part in ("weight", "scales", "biases")],
                        parse_tier("q3g64"),
                    )
                    for name in names
                }
                y = module.run_with(calls[number], products)
                errors.append(mx.square(y - native).sum().item())
        assert errors[1] < 0.97 * errors[0], number


def tuned(checkpoint, text, out, steps=12):
    options = ("-r", "uniform-3", "--quantizer", "gptq", "--calibration", text, *FEW)
    return [*QUANTIZE, checkpoint, "-o", out, *options, "--tune", str(steps)]


def test_tuning_brings_it_nearer_to_native(cli, checkpoint, text, rounded, tmp_path):
    """The same integers; on other text, a smaller divergence."""
    out = tmp_path / "out"
    subprocess.run(tuned(checkpoint, text, out), check=True, capture_output=True)
    assert cli("verify", out).exit_code == 0
    before, after = (mx.load(str(folder / "model.safetensors")) for folder in (rounded, out))
    assert before.keys() == after.keys()
    same = {name for name in before if mx.array_equal(before[name], after[name]).item()}
    moved = set(before) - same
    assert moved
    assert all(name.endswith((".scales", ".biases")) for name in moved)
    other = words(tmp_path / "judged.txt", 5)
    request = quantkit.CalibrationSpec(other, 1024, 64)
    first, second = quantkit.compare(quantkit.open_source(str(checkpoint)), [str(rounded), str(out)], request)  # fmt: skip
    before, after = (result.kl_by_text["judged.txt"].value for result in (first, second))
    assert after < before


def test_a_larger_scale_leaves_its_group_where_it_is(cli, checkpoint, text, rounded, tmp_path, monkeypatch):  # fmt: skip
    """A change of a quarter moves weights by a quarter of a step, around the mean of their group."""

    def grow(self, state, slopes, step):
        state |= {f"{key} change": mx.full(x.shape, 0.25 * key.endswith(" s")) for key, x in slopes.items()}  # fmt: skip

    def falling(self, key, tokens, other):
        kl, g = plain(self, key, tokens, other)
        return kl - next(better), g

    plain, better = ScaleTuner._divergence, itertools.count()
    monkeypatch.setattr(ScaleTuner, "_move", grow)
    monkeypatch.setattr(ScaleTuner, "_divergence", falling)
    result = cli(*tuned(checkpoint, text, tmp_path / "out", 1)[3:])
    assert result.exit_code == 0, result.output
    folders = (rounded, tmp_path / "out")
    before, after = (mx.load(str(folder / "model.safetensors")) for folder in folders)
    names = [name for name in before if name.endswith("experts.down_proj.scales")]
    assert names
    for name in names:
        packed, bias = (name.replace("scales", suffix) for suffix in ("weight", "biases"))
        groups = [
            mx.dequantize(repo[packed], repo[name], repo[bias], 64, 3).astype(mx.float32)
            for repo in (before, after)
        ]
        shape = (*before[name].shape, 64)
        (mean, spread), (new_mean, new_spread) = (
            (np.array(x.reshape(shape).mean(-1)), np.array(mx.std(x.reshape(shape), -1)))
            for x in groups
        )
        steps = np.abs(np.array(before[name].astype(mx.float32)))
        assert np.median((new_spread - spread) / steps) == pytest.approx(0.25, rel=0.05)
        assert (np.abs(new_mean - mean) / steps).max() < 0.05


def test_killed_tuning_goes_on(checkpoint, text, tmp_path):
    subprocess.run(tuned(checkpoint, text, tmp_path / "whole", 4), check=True, capture_output=True)
    command = tuned(checkpoint, text, tmp_path / "out", 4)
    work = tmp_path / "out.partial" / "work"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (work / "tune-0-0.npz").exists():
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    subprocess.run(command, check=True, capture_output=True)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert not work.exists()


def test_a_tuned_shard_that_is_lost_is_written_again(checkpoint, text, tmp_path):
    """Interrupted after its first shards, one of which goes missing then."""
    command = [*tuned(checkpoint, text, tmp_path / "out", 2), "--shard-size", "150kB"]
    whole = [*tuned(checkpoint, text, tmp_path / "whole", 2), "--shard-size", "150kB"]
    subprocess.run(whole, check=True, capture_output=True)
    repo = tmp_path / "out.partial" / "repo"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(repo.glob("model-*.safetensors"))) < 3:
        time.sleep(0.0005)
    process.kill()
    process.wait()
    if repo.exists():  # else it was faster than the look
        (repo / min(path.name for path in repo.glob("model-*.safetensors"))).unlink()
    subprocess.run(command, check=True, capture_output=True)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_tuning_a_dense_tied_model(cli, tmp_path, text):
    """Attention and feed-forward are tuned; the embedding, which is the head, is not."""
    source = write(tmp_path / "src", {**LLAMA, "tie_word_embeddings": True})
    options = ("-r", "uniform-3", "--calibration", text, *FEW, "--quantizer", "gptq")
    for name, extra in (("plain", ()), ("tuned", ("--tune", 20))):
        result = cli("quantize", source, "-o", tmp_path / name, *options, *extra)
        assert result.exit_code == 0, result.output
    before, after = (mx.load(str(tmp_path / n / "model.safetensors")) for n in ("plain", "tuned"))
    moved = {name for name in before if not mx.array_equal(before[name], after[name]).item()}
    assert moved
    assert not any("embed" in name for name in moved)


@pytest.mark.parametrize("tied", [True, False])
def test_tuning_sees_the_model_that_is_written(cli, tmp_path, text, monkeypatch, tied):
    """Its KL divergence on the text to validate is that of the repo: tables are as stored."""
    source = write(tmp_path / "src", {**LLAMA, "tie_word_embeddings": tied})
    seen = []

    def remembered(self, key, tokens, other):
        kl, g = plain(self, key, tokens, other)
        if key == "validation":
            seen.append((tokens, float(kl.mean())))
        return kl, g

    plain = ScaleTuner._divergence
    monkeypatch.setattr(ScaleTuner, "_divergence", remembered)
    options = ("-r", "uniform-3", "--calibration", text, *FEW, "--quantizer", "gptq", "--tune", 1)
    result = cli("quantize", source, "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    tokens, kl = min(seen, key=lambda row: row[1])  # the best point is written
    native, written = (
        StreamingModel(open_source(str(folder), quantized=True))
        for folder in (source, tmp_path / "out")
    )
    outputs = [model.run(tokens, lambda *_: None) for model in (native, written)]
    (again,) = divergence(native, outputs[0], [ChangedModel(outputs[1], None, written)])
    assert kl == pytest.approx(float(again.mean()), rel=1e-3)


@pytest.mark.parametrize("method", ["search", "gptq"])
def test_a_damaged_expert_that_no_token_reaches(cli, tmp_path, text, method):
    def spoil(values):
        for layer in range(4):
            values[f"model.layers.{layer}.mlp.router.bias"][3] = 0xC700  # -32768
        values["model.layers.1.mlp.experts.down_proj_scales"][3, 0, 0] = 255

    source = tiny.write_gpt_oss(tmp_path / "src", spoil)
    options = ("-r", "uniform-3", "--quantizer", method, "--calibration", text, *FEW)
    result = cli("quantize", source, "-o", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert "values are NaN or infinite" in result.stderr
    assert "model.layers.1.mlp.experts.down_proj" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_tuning_goes_with_a_rounding(cli, checkpoint, tmp_path):
    result = cli("quantize", checkpoint, "-r", "uniform-3", "--tune", 2, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "--tune needs" in result.stderr


def test_the_divergences_gradient(checkpoint):
    """Against finite differences, through the blocks of the vocabulary."""
    model = StreamingModel(quantkit.open_source(str(checkpoint)))
    h, other, direction = (mx.random.normal((1, 3, 128), key=mx.random.key(i)) for i in range(3))
    kl, gradient = divergence_gradient(model, h, other)
    (expected,) = divergence(model, h, [ChangedModel(other)])
    assert mx.allclose(kl, expected, rtol=1e-3).item()
    step = 1e-2
    up, down = divergence(model, h, [ChangedModel(other + s * direction) for s in (step, -step)])
    slope = (gradient * direction).sum(axis=-1)
    assert mx.allclose(slope, (up - down) / (2 * step), rtol=0.02, atol=1e-3).item()


def test_rounding_to_nearest_is_mlxs_own(cli, checkpoint, tmp_path):
    for quantizer, out in ((None, "a"), ("rtn", "b")):
        extra = () if quantizer is None else ("--quantizer", quantizer)
        assert cli("quantize", checkpoint, "-r", "uniform-3", "-o", tmp_path / out, *extra).exit_code == 0  # fmt: skip
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_no_such_rounding(cli, checkpoint, tmp_path):
    options = ("-r", "uniform-3", "--quantizer", "best", "-o", tmp_path / "out")
    result = cli("quantize", checkpoint, *options)
    assert result.exit_code == 2
    assert "Use one of rtn, search, gptq" in result.stderr
    assert list(tmp_path.iterdir()) == []
