"""The effect of a weight, read out at its own output or behind its layer."""

import numpy as np
import pytest

from quantkit.backend import mx
from quantkit.checkpoint.source import open_source
from quantkit.sensitivity import probe
from quantkit.sensitivity.entries import candidate_entries
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.layer_trace import hooked
from tests.support.families import MOE, write


@pytest.fixture(params=["gpt-oss", "qwen3-moe"])
def model(request, checkpoint, tmp_path):
    folder = checkpoint if request.param == "gpt-oss" else write(tmp_path / "src", MOE)
    return StreamingModel(open_source(str(folder)))


def call_of(model, number, sequences):
    calls = []
    tokens = mx.random.randint(0, 64, (sequences, 20), key=mx.random.key(0))
    model.run(tokens, lambda _n, call, _y: calls.append(call))
    return calls[number]


def costs(model, number, tiers, sequences):
    """KL costs of the experts of a layer, for random gradients at its output."""
    call = call_of(model, number, sequences)
    g = mx.random.normal((2, *call.x.shape), key=mx.random.key(1))
    weights = [w for w in model.weights.values() if w.layer == number]
    entries = [e for e in candidate_entries(weights, tiers) if "expert" in e.weight.role]
    found = probe.LayerProbe(model.layers[number], weights, model.values).run(
        call, g, entries, lambda _: None
    )
    return found.costs


@pytest.mark.parametrize("sequences", [1, 3])  # few rows come as they are, many sorted by expert
def test_an_experts_output_tells_as_much_as_the_layers(model, monkeypatch, sequences):
    """Exactly for down, to first order for gate and up."""
    near = costs(model, 0, ["q8g32", "q3g32"], sequences)
    monkeypatch.setattr(probe, "_tokens_known", lambda *_: False)
    far = costs(model, 0, ["q8g32", "q3g32"], sequences)
    assert near.keys() == far.keys()
    assert {key[0].rpartition(".")[2] for key in near} == {"gate_proj", "up_proj", "down_proj"}
    for (name, tier), kl in near.items():
        if name.endswith("down_proj"):
            assert np.allclose(kl, far[name, tier], rtol=1e-3), (name, tier)
        else:
            close = 0.02 if tier == "q8g32" else 0.2
            assert np.allclose(kl.mean(), far[name, tier].mean(), rtol=close), (name, tier)


@pytest.mark.parametrize("sequences", [1, 3])
def test_the_token_of_every_row(model, sequences):
    """The input of a row is that of its token."""
    layer = model.layers[0]
    stacks = [n for n, w in model.weights.items() if w.layer == 0 and w.role == "expert_gate"]
    with hooked(layer, stacks, stacks) as module:
        trace = module.record(call_of(model, 0, sequences))
    (step,) = trace.steps
    tokens = np.array(trace.token_of_rows(step))
    assert np.bincount(tokens).tolist() == [2] * (20 * sequences)
    x = step.args[0]
    rows = np.array(mx.broadcast_to(x, (*step.args[1].shape, *x.shape[-2:]))).reshape(
        len(tokens), -1
    )
    for token in range(20 * sequences):
        first, *others = rows[tokens == token]
        assert all(np.array_equal(first, row) for row in others)
    assert len(np.unique(rows, axis=0)) == 20 * sequences
