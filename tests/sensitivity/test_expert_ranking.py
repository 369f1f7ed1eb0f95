"""Which experts are worth most, and what it costs to keep only them."""

from contextlib import ExitStack

import numpy as np
import pytest

from quantkit.artifacts.experts import expert_blocks
from quantkit.backend import mx
from quantkit.checkpoint.source import open_source
from quantkit.sensitivity.expert_ranking import Projections, cross_fitted, rank_experts
from quantkit.streaming.layer_runner import StreamingModel, submodule
from quantkit.streaming.routing import routed_block
from tests.support import standin, tiny
from tests.support.families import FAMILIES, write_from_model

BLOCK = "model.layers.1.mlp"
TOKENS = 60


@pytest.fixture
def block_of():
    """Opens a block: (the block, mlx-lm's own module, inputs, gradients)."""
    with ExitStack() as stack:
        yield lambda folder, path=BLOCK: open_block(stack, folder, path)


def open_block(stack, folder, path):
    source = open_source(str(folder))
    model = StreamingModel(source)
    layer = next(layer for layer in model.layers if path.startswith(f"{layer.path}."))
    module = stack.enter_context(layer.loaded())
    inner = submodule(module, path.removeprefix(f"{layer.path}."))
    block = routed_block(inner, expert_blocks(source.inventory)[path], path)
    width = model.head_weight.shape[-1]
    x = mx.random.normal((TOKENS, width), key=mx.random.key(1))
    g = mx.random.normal((2, TOKENS, width), key=mx.random.key(2))
    return block, inner, x, g


def gpt_oss(folder, change):
    """8 experts, top 4, some values changed."""
    config = standin.config(vocab_size=64)
    return tiny.write_gpt_oss(folder, change, config=config)


@pytest.mark.parametrize("family", ["gpt-oss", *FAMILIES])
def test_predicted_slopes_are_those_of_the_block_itself(tmp_path, block_of, family):
    if family == "gpt-oss":
        folder, counts, active = gpt_oss(tmp_path / "src", lambda _: None), (7, 5, 4), 4
    else:
        folder, counts, active = write_from_model(tmp_path / "src", FAMILIES[family]), (3, 2), 2
    path = list(expert_blocks(open_source(str(folder)).inventory))[-1]
    block, module, x, g = block_of(folder, path)
    ranked = rank_experts(Projections(block, x, g), counts, active)
    assert sorted(ranked.ranking) == list(range(block.experts))
    native = module(x[None])[0]
    for count in counts:
        with block.without(ranked.ranking[count:]):
            moved = module(x[None])[0] - native
        slopes = (g * moved).sum(axis=-1)
        assert mx.abs(slopes).max().item() > 0.01
        assert mx.allclose(ranked.slopes[count], slopes, rtol=1e-2, atol=1e-2).item()


def test_experts_of_huge_outputs_come_out_on_top(tmp_path, block_of):
    def change(values):
        for end in ("blocks", "scales"):
            stack = values[f"{BLOCK}.experts.down_proj_{end}"]
            assert stack.shape[0] == 8
        values[f"{BLOCK}.experts.down_proj_scales"][6] += 6  # 64 times as large
        values[f"{BLOCK}.router.bias"][:] = 0

    block, _, x, g = block_of(gpt_oss(tmp_path / "src", change))
    ranked = rank_experts(Projections(block, x, g), (7, 6, 5, 4), 4)
    assert ranked.ranking[0] == 6


def test_experts_that_no_token_uses_go_first_and_cost_nothing(tmp_path, block_of):
    def change(values):
        bias = values[f"{BLOCK}.router.bias"]
        bias[:] = tiny.bf16(np.where(np.isin(np.arange(8), (1, 5)), -100.0, 0.0))

    block, _, x, g = block_of(gpt_oss(tmp_path / "src", change))
    ranked = rank_experts(Projections(block, x, g), (7, 6, 5), 4)
    assert set(ranked.ranking[6:]) == {1, 5}
    assert not ranked.slopes[6].any().item()
    assert ranked.slopes[5].any().item()


def test_of_two_that_stand_in_for_each_other_one_stays(tmp_path, block_of):
    """Ranked once, both twins would go: either alone is worth nothing while the other is there."""

    def change(values):
        rng = np.random.default_rng(3)
        rows = rng.standard_normal((8, 64))
        rows[4] = 1.01 * rows[0]  # 0 and 4 are wanted by the same tokens
        values[f"{BLOCK}.router.weight"][:] = tiny.bf16(rows)
        values[f"{BLOCK}.router.bias"][:] = 0
        for name in ("gate_up_proj", "down_proj"):
            for end in ("blocks", "scales", "bias"):
                stack = values[f"{BLOCK}.experts.{name}_{end}"]
                stack[4] = stack[0]  # and give the same

    config = standin.config(vocab_size=64, num_experts_per_tok=1, experts_per_token=1)
    block, _, x, g = block_of(tiny.write_gpt_oss(tmp_path / "src", change, config=config))
    ranked = rank_experts(Projections(block, x, g), (7, 6), 1)
    assert len({0, 4} & set(ranked.ranking[7:])) == 1
    assert mx.abs(ranked.slopes[7]).max().item() < 1e-3
    assert len({0, 4} & set(ranked.ranking[6:])) == 1
    assert mx.abs(ranked.slopes[6]).max().item() > 0.1


def test_the_same_twice(tmp_path, block_of):
    folder = gpt_oss(tmp_path / "src", lambda _: None)
    rankings = []
    for _ in range(2):
        block, _, x, g = block_of(folder)
        rankings.append(rank_experts(Projections(block, x, g), (6, 4), 4).ranking)
    assert rankings[0] == rankings[1]


def test_costs_are_those_on_text_that_did_not_rank(tmp_path, block_of):
    """What seems cheapest on a few tokens is dearer on others; on the same ones it is as ranked."""
    block, _, x, g = block_of(gpt_oss(tmp_path / "src", lambda _: None))
    projections = Projections(block, x, g)
    halves = [np.arange(0, TOKENS // 2), np.arange(TOKENS // 2, TOKENS)]
    slopes = cross_fitted(projections, halves, (7, 4), 4)
    for count in (7, 4):
        for tokens, others in zip(halves, reversed(halves), strict=True):
            order = rank_experts(projections.of(others), (7, 4), 4).ranking
            mask = block.mask(order[count:])
            part = projections.of(tokens)
            expected = part.slopes(block.weights(part.x, mask))
            assert mx.allclose(slopes[count][:, mx.array(tokens)], expected, atol=1e-5).item()
    kept = mx.square(rank_experts(projections, (7, 4), 4).slopes[7]).mean()
    assert mx.square(slopes[7]).mean().item() > kept.item()
