"""A source without some of its experts computes what the whole one does if it never routes there."""

import numpy as np
import pytest

from quantkit.artifacts.experts import expert_blocks
from quantkit.backend import mx
from quantkit.checkpoint.pruned import pruned_source
from quantkit.checkpoint.source import open_source
from quantkit.errors import SourceError
from quantkit.streaming.layer_runner import StreamingModel, submodule
from quantkit.streaming.routing import routed_block
from tests.support import tiny
from tests.support.families import FAMILIES, write_from_model


def write(folder, family):
    if family == "gpt-oss":
        return tiny.write_gpt_oss(folder)
    if family == "gpt-oss-bf16":
        return tiny.write_gpt_oss(folder, packed=False)
    return write_from_model(folder, FAMILIES[family])


@pytest.fixture(params=["gpt-oss", "gpt-oss-bf16", *FAMILIES])
def source(request, tmp_path):
    return open_source(str(write(tmp_path / "src", request.param)))


def kept_of(source, count):
    rng = np.random.default_rng(0)
    experts = source.inventory.experts
    return {
        block: tuple(sorted(rng.permutation(experts)[:count].tolist()))
        for block in expert_blocks(source.inventory)
    }


def test_it_holds_the_kept_experts(source):
    kept = kept_of(source, 3)
    pruned = pruned_source(source, kept)
    experts, blocks = source.inventory.experts, expert_blocks(source.inventory)
    cut = {name: block for block, names in blocks.items() for name in names}
    assert pruned.inventory.experts == pruned.checkpoint.settings.experts == 3
    assert pruned.inventory.source == source.inventory.source
    seen = 0
    for name, view in source.views.items():
        owner, _, last = name.rpartition(".")
        block = cut.get(name) or (cut.get(f"{owner}.weight") if last == "scales" else None)
        whole = source.read(name, 0, view.rows)
        less = pruned.read(name, 0, pruned.views[name].rows)
        if block is None:
            assert np.array_equal(whole, less)
            continue
        seen += 1
        if view.rows % experts:  # a vector with a value per expert
            assert np.array_equal(less, whole[:, list(kept[block])])
        else:
            stacks = whole.reshape(experts, -1, view.width)[list(kept[block])]
            assert np.array_equal(less, stacks.reshape(-1, view.width))
            cut_at = max(1, len(less) // 2 // view.step * view.step)
            rows = slice(cut_at - view.step, cut_at + view.step)
            assert np.array_equal(pruned.read(name, rows.start, rows.stop), less[rows])
    assert seen >= 4


def test_it_computes_what_the_whole_one_does_without_them(source):
    tokens = mx.random.randint(0, 64, (2, 12), key=mx.random.key(0))
    kept = kept_of(source, 3)
    whole, pruned = StreamingModel(source), StreamingModel(pruned_source(source, kept))
    blocks, experts = expert_blocks(source.inventory), range(source.inventory.experts)
    outputs, masked = [], {}

    def run_masked(layer):
        def run(call):
            with layer.loaded() as module, masked_blocks(module, layer.path):
                return module(call.x, *call.args, **call.kwargs)

        return run

    def masked_blocks(module, path):
        from contextlib import ExitStack

        stack = ExitStack()
        for block, names in blocks.items():
            if block.startswith(f"{path}."):
                inner = submodule(module, block.removeprefix(f"{path}."))
                gone = [e for e in experts if e not in kept[block]]
                stack.enter_context(routed_block(inner, names, block).without(gone))
                masked[block] = gone
        return stack

    outputs.append(pruned(tokens))
    with whole._instead([run_masked(layer) for layer in whole.layers]):
        outputs.append(whole(tokens))
    assert masked.keys() == blocks.keys()
    native = whole(tokens)
    assert mx.allclose(*outputs, rtol=1e-3, atol=1e-4).item()
    assert not mx.allclose(outputs[0], native, rtol=1e-2, atol=1e-2).item()


def test_routers_with_groups_are_refused(tmp_path):
    config = {**FAMILIES["glm4-moe"], "n_group": 2, "topk_group": 1}
    source = open_source(str(write_from_model(tmp_path / "src", config)))
    with pytest.raises(SourceError, match="groups of experts"):
        pruned_source(source, kept_of(source, 2))
