"""Quantizing by a published importance matrix, in place of text."""

import json
from dataclasses import replace

import numpy as np
import pytest

import quantkit
from quantkit.artifacts.experts import Pruning, expert_blocks
from quantkit.backend import mx
from quantkit.backend.memory_limits import MemoryLimits
from quantkit.calibration.calibration_set import read_calibration_set
from quantkit.checkpoint.source import open_source
from quantkit.formats.tiers import parse_tier
from quantkit.planning.plan import make_plan
from quantkit.planning.recipe import load_recipe, plan_by_recipe
from quantkit.quantizers.input_sums import Inputs, InputSums
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.layer_trace import hooked
from tests.support import tiny
from tests.support.repo import write_repo
from tests.support.text import words

GGUF = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps",
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return words(tmp_path_factory.mktemp("text") / "text.txt", 3)


@pytest.fixture(scope="module")
def imatrix(checkpoint, text, tmp_path_factory):
    """What llama.cpp would collect on the text that `search` calibrates on."""
    source = quantkit.open_source(str(checkpoint))
    model, arrays = StreamingModel(source), {}
    tokens = read_calibration_set(
        source.checkpoint, quantkit.CalibrationSpec(str(text), 512)
    ).tokens
    calls = []
    model.run(mx.array(tokens), lambda _n, call, _y: calls.append(call))
    for number, (layer, call) in enumerate(zip(model.layers, calls, strict=True)):
        names = {n: w for n, w in model.weights.items() if n.startswith(f"{layer.path}.")}
        with hooked(layer, list(names)) as module:
            for step in module.record(call).steps:
                if (last := step.name.rpartition(".")[2]) not in GGUF:
                    continue
                matrices = len(model.values(step.name)) if "experts" in step.name else 1
                sums = InputSums(matrices)
                sums.add(Inputs.of(step.args))
                name = f"blk.{number}.{GGUF[last]}.weight"
                squares = [np.diag(np.array(sums.total(i))) for i in range(matrices)]
                # As llama.cpp stores them, a plain weight's sums have one dimension.
                stored = np.stack(squares) if matrices > 1 else np.stack(squares)[0]
                arrays[f"{name}.in_sum2"] = mx.array(stored)
                arrays[f"{name}.counts"] = mx.array(sums.counts.astype(np.float32)[:, None])
    path = tmp_path_factory.mktemp("imatrix") / "tiny.gguf"
    sizes = {
        "imatrix.chunk_count": mx.array(2, mx.uint32),
        "imatrix.chunk_size": mx.array(256, mx.uint32),
    }
    mx.save_gguf(str(path), arrays, {"general.type": "imatrix", **sizes})
    return path


def weights(out):
    return mx.load(str(out / "model.safetensors"))


BEHIND = ("o_proj.scales", "down_proj.scales")  # on text they make up for errors before them


def test_it_is_the_search_on_the_same_text(cli, checkpoint, text, imatrix, tmp_path):
    more = ("--calibration", text, "--quantizer-tokens", 512, "--quantizer", "search")
    command = ("quantize", checkpoint, "-r", "uniform-3", "-o")
    assert cli(*command, tmp_path / "text", *more).exit_code == 0
    result = cli(*command, tmp_path / "out", "--imatrix", imatrix)
    assert result.exit_code == 0, result.output
    assert "lacks" in result.stderr
    assert cli("verify", tmp_path / "out").exit_code == 0
    assert cli(*command, tmp_path / "rtn").exit_code == 0
    theirs, ours, nearest = (weights(tmp_path / name) for name in ("text", "out", "rtn"))
    packed = [n for n in ours if n.endswith(".scales") and ".layers." in n and "router" not in n]
    assert packed
    for name in packed:
        same, moved = ((ours[name] == other[name]).mean().item() for other in (theirs, nearest))
        assert same > 0.99 or name.endswith(BEHIND), name
        assert moved < 0.5, name
    assert mx.array_equal(ours["lm_head.scales"], nearest["lm_head.scales"])
    report = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert report["plan"]["quantizer"] == "search"
    assert report["plan"]["calibration_texts"][0]["name"] == "imatrix tiny.gguf"
    assert (
        "Calibrated on 512 tokens of imatrix tiny.gguf"
        in (tmp_path / "out" / "README.md").read_text()
    )


def test_a_budget_takes_it_too(cli, checkpoint, text, imatrix, tmp_path):
    few = ("--calibration", text, "--tokens", 48)
    result = cli(
        "quantize", checkpoint, "-b", "5bpw", *few, "-o", tmp_path / "out", "--imatrix", imatrix
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert report["plan"]["quantizer"] == "search"


def changed(imatrix, tmp_path, change):
    arrays, metadata = mx.load(str(imatrix), return_metadata=True)
    path = tmp_path / "changed.gguf"
    mx.save_gguf(str(path), {k: v for n, a in arrays.items() for k, v in change(n, a)}, metadata)
    return path


def cut(name, array):
    yield name, array[..., :32] if name.endswith("in_sum2") else array


def renamed(name, array):
    yield name.replace("blk", "layer"), array


def negative(name, array):
    yield name, -array


@pytest.mark.parametrize(
    ("change", "says"),
    [(cut, "of another model"), (renamed, "names no weight"), (negative, "is damaged")],
)
def test_files_that_do_not_fit(cli, checkpoint, imatrix, tmp_path, change, says):
    path = changed(imatrix, tmp_path, change)
    result = cli(
        "quantize", checkpoint, "-r", "uniform-3", "-o", tmp_path / "out", "--imatrix", path
    )
    assert result.exit_code == 2
    assert says in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"old", "is not a GGUF file"), (b"GGUF\3\0\0\0", "is damaged"), (None, "cannot be read")],
)
def test_files_that_are_none(cli, checkpoint, tmp_path, data, says):
    path = tmp_path / "file"
    if data is not None:
        path.write_bytes(data)
    result = cli(
        "quantize", checkpoint, "-r", "uniform-3", "-o", tmp_path / "out", "--imatrix", path
    )
    assert result.exit_code == 2
    assert says in result.stderr


@pytest.mark.parametrize(
    "more", [("--quantizer", "gptq"), ("--tune", 4), ("--quantizer-tokens", 512)]
)
def test_options_that_contradict_it(cli, checkpoint, imatrix, tmp_path, more):
    command = (
        "quantize",
        checkpoint,
        "-r",
        "uniform-3",
        "-o",
        tmp_path / "out",
        "--imatrix",
        imatrix,
    )
    result = cli(*command, *more)
    assert result.exit_code == 2
    assert "`imatrix`" in result.stderr or "--imatrix" in result.stderr


def test_experts_without_tokens_have_the_others_inputs(imatrix, checkpoint, tmp_path):
    from quantkit.quantizers.imatrix import load_imatrix

    def starved(name, array):
        if "exps" in name:
            array = mx.concatenate([mx.zeros_like(array[:1]), array[1:]])
        yield name, array

    inventory = quantkit.open_source(str(checkpoint)).inventory
    found = load_imatrix(changed(imatrix, tmp_path, starved), inventory)
    name = next(name for name in found.importance if name.endswith("down_proj"))
    importance, counts = found.importance[name], found.inputs[name]
    assert counts[0] == 0
    others = importance[1:].mean(axis=0)
    assert np.corrcoef(importance[0], others)[0, 1] > 0.9
    assert found.text.sequences == 2


def test_of_the_experts_that_are_kept(checkpoint, imatrix, tmp_path):
    """The file has all experts; a plan may keep some of them."""
    source = open_source(str(checkpoint))
    kept = dict.fromkeys(expert_blocks(source.inventory), (1, 2, 3))
    tiers = {
        w.name: parse_tier("q3g64" if w.role.startswith("expert") else "native")
        for w in source.inventory.weights
    }
    whole = make_plan(source.inventory, tiers, "all")
    pruning = Pruning(4, kept, source.inventory.parameters)
    pruned = make_plan(source.inventory, tiers, "three of four", pruning)
    for name, plan in (("all", whole), ("some", pruned)):
        write_repo(source, replace(plan, quantizer="search"), tmp_path / name, imatrix=imatrix)
    everything, some = weights(tmp_path / "all"), weights(tmp_path / "some")
    stacks = [name for name in everything if ".experts." in name]
    assert len(stacks) > 20
    for name in stacks:
        assert mx.array_equal(everything[name][1:], some[name]).item(), name


def test_experts_are_read_whole_in_little_memory(imatrix, tmp_path, monkeypatch):
    """The experts of a fine-tune in BF16 are stored transposed, and cannot be cut by rows."""
    source = open_source(str(tiny.write_gpt_oss(tmp_path / "src", packed=False)))
    plan = plan_by_recipe(source.inventory, load_recipe("uniform-3"))
    plan = replace(plan, quantizer="search")
    write_repo(source, plan, tmp_path / "much", imatrix=imatrix)
    few = MemoryLimits(block_values=5 * 64)
    monkeypatch.setattr("quantkit.quantizers.imatrix.memory_limits", lambda: few)
    write_repo(source, plan, tmp_path / "little", imatrix=imatrix)
    much, little = weights(tmp_path / "much"), weights(tmp_path / "little")
    assert any(name.endswith("gate_proj.scales") for name in much)
    for name in much:
        assert mx.array_equal(much[name], little[name]).item(), name
