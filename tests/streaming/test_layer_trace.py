"""Replays of a layer: what changed weights of a block do to the inputs behind them."""

import pytest
from mlx_lm.models import llama

from quantkit.backend import mx
from quantkit.checkpoint.source import open_source
from quantkit.formats.codec import encode
from quantkit.formats.tiers import parse_tier
from quantkit.quantizers.embeddings import embedding_hessians
from quantkit.storage.work_dir import WorkDirectory
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.layer_trace import HookedLayer, hooked
from quantkit.streaming.measure_kl import measure_kl
from quantkit.streaming.products import packed_product
from tests.support.families import LLAMA, write
from tests.support.text import words

TIER = parse_tier("q2g32")


@pytest.mark.parametrize("sequences", [1, 3])
def test_a_replay_is_a_run_with_the_blocks_weights_changed(checkpoint, sequences):
    """Attention and experts at once, each on its native inputs."""
    model = StreamingModel(open_source(str(checkpoint)))
    calls = []
    tokens = mx.random.randint(0, 64, (sequences, 20), key=mx.random.key(0))
    model.run(tokens, lambda _n, call, _y: calls.append(call))
    layer = model.layers[1]
    names = {n.rpartition(".")[2]: n for n, w in model.weights.items() if w.layer == 1}
    changed = {
        name: packed_product(encode(model.values(names[name]), TIER), TIER)
        for name in ("q_proj", "v_proj", "gate_proj")
    }
    with hooked(layer, list(names.values())) as module:
        trace = module.record(calls[1])
        products = {names[name]: product for name, product in changed.items()}
        behind = [names["o_proj"], names["down_proj"]]
        pairs = module.replay(trace, products, behind)
        assert [call.name for _, call in pairs] == behind
        native = {step.name: step for step in trace.steps}
        for block, (before, call) in zip(("attn", "mlp"), pairs, strict=True):
            alone = [name for name in names.values() if block in name and name in products]
            steps = with_changed(module, model, calls[1], alone)
            (expected,) = (step for step in steps if step.name == call.name)
            assert before is native[call.name]
            assert mx.allclose(call.args[0], expected.args[0], atol=1e-4)
            assert not mx.allclose(call.args[0], before.args[0], atol=1e-2)
            assert all(
                mx.array_equal(a, b) for a, b in zip(call.args[1:2], before.args[1:2], strict=True)
            )


def with_changed(module, model, call, names):
    """The calls of a run in which some weights are changed."""
    if not names:
        return module.record(call).steps
    with module.changed(names[0], model.values(names[0]), TIER):
        return with_changed(module, model, call, names[1:])


def test_changed_weights_are_in_memory_only_as_packed(checkpoint, monkeypatch):
    """While a layer runs with all of its experts changed, their native values are gone."""

    def run(self, call):
        memory.append(mx.get_active_memory())
        return plain(self, call)

    plain, memory = HookedLayer.run, []
    monkeypatch.setattr(HookedLayer, "run", run)
    model = StreamingModel(open_source(str(checkpoint)))
    experts = [w for w in model.weights.values() if w.layer == 1 and w.role.startswith("expert")]
    assert len(experts) == 3
    tiers = {weight.name: TIER for weight in experts}
    measure_kl(model, mx.zeros((1, 8), mx.int32), [tiers], lambda _: None)
    assert max(memory) - min(memory) < model.values(experts[0].name).nbytes


def test_layers_whose_kernels_have_no_gradient_are_differentiated_without_them(
    cli, tmp_path, monkeypatch
):
    """Profiles, embeddings and tuning all differentiate layers; mlx-lm's linear attention runs a
    Metal kernel unless it trains."""

    @mx.custom_function
    def kernel(x):
        return x + 0

    @kernel.vjp
    def gradient(*_):
        raise ValueError("[Primitive::vjp] Not implemented for CustomKernel.")

    def attend(self, x, *args):
        modes.add(self.training)
        y = plain(self, x, *args)
        return y if self.training else kernel(y)

    plain, modes = llama.Attention.__call__, set()
    monkeypatch.setattr(llama.Attention, "__call__", attend)
    source = write(tmp_path / "src", {**LLAMA, "tie_word_embeddings": False})
    text = words(tmp_path / "text.txt", 3)
    sizes = ("--calibration", text, "--tokens", 48, "--quantizer-tokens", 512)
    options = ("-b", "5bpw", *sizes, "--quantizer", "gptq", "--tune", 1)
    done = cli("quantize", source, "-o", tmp_path / "out", *options)
    assert done.exit_code == 0, done.output
    assert modes == {True, False}
    model = StreamingModel(open_source(str(source)))
    names, tokens = ["model.embed_tokens"], mx.zeros((1, 8), mx.int32)
    assert embedding_hessians(model, names, tokens, WorkDirectory(tmp_path), lambda *_: None)
