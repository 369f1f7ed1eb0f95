"""Routing weights and single experts, from mlx-lm's own blocks."""

import numpy as np
import pytest

from quantkit.artifacts.experts import expert_blocks
from quantkit.backend import mx
from quantkit.checkpoint.source import open_source
from quantkit.streaming.layer_runner import StreamingModel, submodule
from quantkit.streaming.routing import routed_block
from tests.support import tiny
from tests.support.families import FAMILIES, write_from_model

ACTIVE = 2


@pytest.fixture(params=["gpt-oss", *FAMILIES])
def routed(request, tmp_path):
    """(a block of experts with its weights in memory, mlx-lm's own, 30 inputs)"""
    if request.param == "gpt-oss":
        folder = tiny.write_gpt_oss(tmp_path / "src")
    else:
        folder = write_from_model(tmp_path / "src", FAMILIES[request.param])
    source = open_source(str(folder))
    model = StreamingModel(source)
    path, names = list(expert_blocks(source.inventory).items())[-1]
    layer = next(layer for layer in model.layers if path.startswith(f"{layer.path}."))
    with layer.loaded() as module:
        inner = submodule(module, path.removeprefix(f"{layer.path}."))
        x = mx.random.normal((30, model.head_weight.shape[-1]), key=mx.random.key(1))
        yield routed_block(inner, names, path), inner, x


def combined(block, weights, x):
    """The sum over experts of routing weight times output."""
    tokens, experts = (mx.array(i.astype(np.int32)) for i in np.nonzero(np.array(weights)))
    y = mx.zeros_like(x)
    for rows, outputs in block.outputs(x[tokens], experts):
        at = tokens[rows]
        y = y.at[at].add(weights[at, experts[rows]][:, None] * outputs)
    return y


def without_shared(module):
    """The same, for a block whose shared experts add to every token."""
    return next((module[n] for n in module if n == "shared_experts"), None)


def test_weights_times_outputs_are_the_block(routed):
    block, module, x = routed
    weights = block.weights(x, block.mask([]))
    assert weights.shape == (30, block.experts)
    assert ((weights != 0).sum(axis=-1) == ACTIVE).all().item()
    y = combined(block, weights, x)
    shared = without_shared(module)
    if shared is not None:
        y = y + shared(x)
    assert mx.allclose(y, module(x[None])[0], rtol=1e-3, atol=1e-4).item()


def test_removed_experts_get_nothing(routed):
    block, module, x = routed
    gone = [0, 2]
    weights = block.weights(x, block.mask(gone))
    assert not weights[:, mx.array(gone)].any().item()
    assert ((weights != 0).sum(axis=-1) == ACTIVE).all().item()
    with block.without(gone):
        masked = module(x[None])[0]
    shared = without_shared(module)
    y = combined(block, weights, x) + (0 if shared is None else shared(x))
    assert mx.allclose(y, masked, rtol=1e-3, atol=1e-4).item()
    after = block.weights(x, block.mask([]))  # and the block is as before
    assert not mx.array_equal(after, weights).item()


def test_a_mask_for_each_token(routed):
    block, _, x = routed
    used = mx.argmax(block.weights(x, block.mask([])), axis=-1)
    mask = mx.where(used[:, None] == mx.arange(block.experts), -mx.inf, 0.0)
    weights = block.weights(x, mask)
    assert not mx.take_along_axis(weights, used[:, None], axis=-1).any().item()
    for token in range(30):
        alone = block.weights(x[token : token + 1], mask[token])
        assert mx.allclose(alone[0], weights[token], rtol=1e-4, atol=1e-6).item()
