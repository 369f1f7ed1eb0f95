"""A model that streams is the model that mlx-lm loads."""

from importlib.metadata import version

import pytest
from mlx_lm.models import llama

from quantkit.backend import mx, on_cpu
from quantkit.checkpoint.source import open_source
from quantkit.errors import SourceError
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.measure_kl import measure_kl
from tests.support import tiny
from tests.support.families import (
    GEMMA,
    GEMMA3N,
    GEMMA4,
    LLAMA,
    MOE,
    NANBEIGE,
    write,
    write_from_model,
)
from tests.support.reference import plainly_loaded
from tests.support.text import words


def sources(tmp_path):
    return {
        "gpt-oss": lambda: tiny.write_gpt_oss(tmp_path / "src"),
        "llama": lambda: write(tmp_path / "src", LLAMA),
        "gemma3": lambda: write_from_model(tmp_path / "src", GEMMA),
        "qwen3-moe": lambda: write(tmp_path / "src", MOE),
        "qwen3-moe-f16": lambda: write(tmp_path / "src", MOE, "F16"),
    }


@pytest.mark.skipif(not on_cpu(), reason="the reference is float32")
@pytest.mark.parametrize("kind", ["gpt-oss", "llama", "gemma3", "qwen3-moe", "qwen3-moe-f16"])
@pytest.mark.parametrize("length", [3, 40])
def test_logits_are_those_of_a_plain_load(tmp_path, kind, length):
    folder = sources(tmp_path)[kind]()
    tokens = mx.random.randint(0, 64, (2, length), key=mx.random.key(0))
    expected = plainly_loaded(folder)(tokens)
    model = StreamingModel(open_source(str(folder)))
    assert mx.allclose(model(tokens), expected, atol=1e-4).item()
    assert mx.abs(expected).max().item() > 0.1
    h = model.run(tokens, lambda *_: None)
    assert mx.allclose(model.head_block(h, range(8, 24)), expected[..., 8:24], atol=1e-4).item()


def test_fine_tunes_that_mlx_lm_refuses(tmp_path):
    """BF16 experts, decoded from MXFP4 and stored as fine-tunes do, give the published logits."""
    packed = tiny.write_gpt_oss(tmp_path / "packed")
    source = open_source(str(packed))
    decoder = StreamingModel(source)
    values = {}
    for weight in source.inventory.weights:
        if weight.role.startswith("expert"):
            values[weight.name] = decoder.values(weight.name).astype(mx.float32).swapaxes(1, 2)

    def store(tensors):
        published = {spec.name: v for spec, v in tiny.gpt_oss_tensors()}
        for name, array in tensors.items():
            if name in published:
                array[...] = published[name]
                continue
            at = name.rpartition(".")[0]
            if name.endswith("gate_up_proj"):
                array[..., 0::2] = tiny.bf16(values[f"{at}.gate_proj"])
                array[..., 1::2] = tiny.bf16(values[f"{at}.up_proj"])
            else:
                array[...] = tiny.bf16(values[name])

    plain = tiny.write_gpt_oss(tmp_path / "plain", store, packed=False)
    tokens = mx.random.randint(0, 64, (1, 20), key=mx.random.key(0))
    expected = StreamingModel(source)(tokens)
    assert mx.allclose(StreamingModel(open_source(str(plain)))(tokens), expected, atol=1e-5).item()


def test_layers_and_head_make_the_whole(checkpoint):
    model = StreamingModel(open_source(str(checkpoint)))
    tokens = mx.random.randint(0, 64, (2, 12), key=mx.random.key(0))
    calls = []
    last = model.run(tokens, lambda number, call, y: calls.append((number, call, y)))
    assert [number for number, _, _ in calls] == list(range(len(model.layers)))
    for layer, (_, call, y) in zip(model.layers, calls, strict=True):
        assert mx.array_equal(layer.run(call), y)
    assert mx.array_equal(model.head(last), model(tokens))
    assert mx.array_equal(model.calls(tokens)[3].x, calls[0][1].x)


def test_the_head_comes_in_blocks(checkpoint):
    model = StreamingModel(open_source(str(checkpoint)))
    h = mx.random.normal((1, 5, 128), key=mx.random.key(0))
    whole = model.head(h)
    blocks = [model.head_block(h, rows) for rows in (range(10), range(10, 64))]
    assert mx.allclose(mx.concatenate(blocks, axis=-1), whole, atol=1e-5)


def test_values_that_are_not_finite_name_the_layer(tmp_path):
    def spoil(values):
        values["model.layers.2.self_attn.o_proj.bias"][0] = 0x7FC0

    model = StreamingModel(open_source(str(tiny.write_gpt_oss(tmp_path / "src", spoil))))
    with pytest.raises(SourceError, match=r"layer 2 \(model.layers.2\): .* not finite"):
        model.run(mx.zeros((1, 4), mx.int32), lambda *_: None)


def test_outputs_that_change_between_layers_are_refused_before_anything_is_measured(
    tmp_path, monkeypatch
):
    def doubling(self, tokens, *_):
        h = self.embed_tokens(tokens)
        for layer in self.layers:
            h = 2 * layer(h, "causal", None)
        return self.norm(h)

    source = open_source(str(write(tmp_path / "src", LLAMA)))
    tokens = mx.zeros((2, 4), mx.int32)
    sound = StreamingModel(source)
    sound.run(tokens, lambda *_: None)
    monkeypatch.setattr(llama.LlamaModel, "__call__", doubling)
    sound.require_layerwise(tokens)  # its run has shown it
    with pytest.raises(SourceError, match="changes the output between layers 0 and 1"):
        measure_kl(StreamingModel(source), tokens, [{}], lambda _: None)


REFUSED = {
    "gemma4": (GEMMA4, "gemma4_text: its layers pass more than one array"),
    "gemma3n": (GEMMA3N, "gemma3n: its layers pass more than one array"),
    "nanbeige": (NANBEIGE, "nanbeige: computes more than its layers once and its head"),
    "nanbeige without norms": ({**NANBEIGE, "skip_loop_final_norm": True}, "nanbeige: computes"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_are_more_than_their_layers_and_head_are_refused(cli, tmp_path, kind):
    """In one line, by profiles, calibrated quantizers and comparisons alike."""
    config, message = REFUSED[kind]
    folder = write_from_model(tmp_path / "src", config)
    tokens = mx.random.randint(0, 64, (3, 40), key=mx.random.key(0))
    model = StreamingModel(open_source(str(folder)))
    if on_cpu():
        assert mx.allclose(model(tokens), plainly_loaded(folder)(tokens), atol=1e-3).item()
    with pytest.raises(SourceError, match=message):
        measure_kl(model, tokens, [{}], lambda _: None)
    with pytest.raises(SourceError, match=message):
        StreamingModel(open_source(str(folder))).run(tokens, lambda *_: None)
    text = words(tmp_path / "text.txt", 3)
    gptq = ("-r", "uniform-3", "--quantizer", "gptq")
    for command in (
        ("profile", folder, "-o", tmp_path / "profile", "--calibration", text, "--tokens", 48),
        ("quantize", folder, "-o", tmp_path / "out", *gptq, "--calibration", text),
        ("compare", folder, folder, "--text", text),
    ):
        done = cli(*command)
        assert done.exit_code == 2, done.output
        assert message in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ")


def test_weights_are_let_go(checkpoint):
    model = StreamingModel(open_source(str(checkpoint)))
    tokens = mx.zeros((1, 4), mx.int32)
    mx.eval(model(tokens))
    mx.clear_cache()
    held = mx.get_active_memory()
    for layer in model.layers:
        with layer.loaded():
            mx.eval(layer.module.parameters())
    assert mx.get_active_memory() <= held + 10_000


@pytest.mark.skipif(
    version("mlx-lm").startswith("0.31"), reason="mlx-lm differentiates its expert indices there"
)
def test_gradients_pass_through_a_layer(checkpoint):
    """The product along a direction is the slope along it."""
    model = StreamingModel(open_source(str(checkpoint)))
    calls = []
    tokens = mx.random.randint(0, 64, (1, 70), key=mx.random.key(0))
    model.run(tokens, lambda number, call, y: calls.append(call))
    layer, call = model.layers[2], calls[2]
    direction = mx.random.normal(call.x.shape, key=mx.random.key(1))
    cotangent = mx.random.normal(call.x.shape, key=mx.random.key(2))
    with layer.loaded() as module:

        def run(x):
            return module(x, *call.args, **call.kwargs)

        _, (gradient,) = mx.vjp(run, [call.x], [cotangent])
        step = 1e-2
        ahead, behind = run(call.x + step * direction), run(call.x - step * direction)
    slope = ((ahead - behind) * cotangent).sum() / (2 * step)
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=0.03)
