"""One float type for all that is not packed, as mlx_lm.convert gives it."""

import json
from collections import Counter

import mlx_lm
import numpy as np
import pytest

from quantkit.backend import mx
from quantkit.checkpoint.source import STORED, open_source
from quantkit.evaluation.verify import verify
from quantkit.formats.tiers import TensorSpec
from quantkit.planning.recipe import load_recipe, plan_by_recipe
from quantkit.publish.record import read_report
from tests.support import tiny
from tests.support.families import LLAMA, MOE, tensors, write_from_model
from tests.support.repo import write_repo
from tests.support.text import rows

MERGED = ("self_attn.q_proj.weight", "norm.weight", "v_proj.bias", "lm_head.weight")
KLEAR = {
    **MOE,
    "model_type": "Klear",
    "attention_bias": False,
    "n_shared_experts": 1,
    "rope_theta": 1e4,
}


def merged_in_f32(folder, config, *, every_weight=False):
    """A gpt-oss whose LoRA was merged in F32: some of its tensors are."""
    held = []
    for spec, values in tiny.gpt_oss_tensors(config):
        if spec.dtype == "BF16" and (every_weight or spec.name.endswith(MERGED)):
            rng = np.random.default_rng(1)  # values that BF16 cannot hold
            noise = 1 + 1e-3 * rng.standard_normal(spec.shape)
            values = (tiny.from_bf16(values) * noise).astype(np.float32)
            spec = TensorSpec(spec.name, "F32", spec.shape)
        held.append((spec, values))
    return tiny.write_checkpoint(folder, config, held)


def rewritten(source, out, recipe="mxfp4-q8", floats="stated"):
    opened = open_source(str(source), floats=floats)
    plan = plan_by_recipe(opened.inventory, load_recipe(recipe))
    report = write_repo(opened, plan, out)
    assert report.total_bytes == plan.total_bytes == sum(t.nbytes for t in tensors(out).values())
    assert all(check.ok for check in verify(out, read_report(out)))
    return tensors(out)


def types(held):
    return Counter(str(value.dtype).removeprefix("mlx.core.") for value in held.values())


def same_as_convert(source, out, ours, **options):
    mlx_lm.convert(str(source), str(out), quantize=True, q_group_size=64, **options)
    theirs = tensors(out)
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not mx.array_equal(ours[name], theirs[name]).item()]


STATED = [{"torch_dtype": "bfloat16"}, {"torch_dtype": "float16"}, {"torch_dtype": "float32"}]


@pytest.mark.parametrize("stated", STATED, ids=lambda d: d["torch_dtype"])
def test_a_merged_lora_becomes_what_convert_makes_of_it(tmp_path, stated):
    source = merged_in_f32(tmp_path / "src", {**tiny.CONFIG, **stated})
    found = rewritten(source, tmp_path / "out")
    assert types(found).keys() == {"uint32", "uint8", stated["torch_dtype"]}
    assert same_as_convert(source, tmp_path / "theirs", found, q_bits=8) == []


@pytest.mark.parametrize("recipe", ["mxfp4-q8", "uniform-4"])
def test_where_nothing_is_stated_most_values_decide(tmp_path, recipe):
    """Stock mlx-lm computes, and keeps its cache, in the widest type: one F32 norm is enough."""
    source = merged_in_f32(tmp_path / "src", tiny.CONFIG)
    rewritten(source, tmp_path / "out", recipe)
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    assert model(mx.array([[3, 4]])).dtype == mx.bfloat16
    cache = model.make_cache()
    model(mx.array([[3, 4]]), cache=cache)
    assert {c.keys.dtype for c in cache} == {mx.bfloat16}


def test_a_published_checkpoint_is_as_it_was(tmp_path, checkpoint):
    opened = open_source(str(checkpoint))
    stored = open_source(str(checkpoint), floats=STORED)
    assert opened.inventory == stored.inventory


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("recipe", ["mxfp4-q8", "uniform-3"])
def test_a_type_that_is_asked_for(tmp_path, checkpoint, dtype, recipe):
    """Scales of experts that were MXFP4, too; and bytes are counted so."""
    found = rewritten(checkpoint, tmp_path / "out", recipe, floats=dtype)
    assert types(found).keys() <= {"uint32", "uint8", dtype}
    assert types(found)[dtype] > 50
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    assert model(mx.array([[3, 4]])).dtype == getattr(mx, dtype)


def test_the_command_and_its_bytes(cli, tmp_path, checkpoint):
    options = ("-r", "uniform-4", "--dtype", "float32")
    planned = json.loads(cli("plan", checkpoint, *options, "--json").stdout)
    smaller = json.loads(cli("plan", checkpoint, "-r", "uniform-4", "--json").stdout)
    assert planned["total_bytes"] > smaller["total_bytes"]
    done = cli("quantize", checkpoint, *options, "-o", tmp_path / "out", "--json")
    assert json.loads(done.stdout)["total_bytes"] == planned["total_bytes"]
    assert "--dtype float32" in json.loads(done.stdout)["command"]
    again = cli("quantize", checkpoint, "-r", "uniform-4", "-o", tmp_path / "out")
    assert again.exit_code == 2  # not taken for the same
    assert "holds another quant" in again.stderr


def test_the_config_says_what_is_stored(tmp_path):
    text = {"torch_dtype": "bfloat16", "dtype": "bfloat16"}
    source = tiny.write_gpt_oss(tmp_path / "src", config={**tiny.CONFIG, **text})
    rewritten(source, tmp_path / "out", floats="float16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["torch_dtype"], config["dtype"]) == ("float16", "float16")


def test_what_a_model_keeps_in_f32_stays(tmp_path):
    """mlx-lm's `cast_predicate`: Klear's expert biases decide on routing."""
    config = {**KLEAR, "torch_dtype": "bfloat16"}
    source = write_from_model(tmp_path / "src", config, lambda name: "F32")
    found = rewritten(source, tmp_path / "out")
    in_f32 = {name for name, value in found.items() if value.dtype == mx.float32}
    assert in_f32 == {"model.layers.0.mlp.expert_bias"}
    mlx_lm.convert(str(source), str(tmp_path / "theirs"), quantize=False)
    theirs = tensors(tmp_path / "theirs")
    assert {name for name, value in theirs.items() if value.dtype == mx.float32} == in_f32
    unpacked = [
        name for name in found if name in theirs and theirs[name].dtype == found[name].dtype
    ]
    assert len(unpacked) > 8
    assert all(mx.array_equal(found[name], theirs[name]).item() for name in unpacked)


def test_a_profile_serves_every_type(cli, tmp_path, checkpoint):
    profile, options = tmp_path / "p", ("--tokens", 64, "--sequence-length", 16)
    text = rows(tmp_path / "text.jsonl", seed=0, count=40, length=20)
    cli("profile", checkpoint, "-o", profile, *options, "--tiers", "q4g64", "--calibration", text)
    budget = ("--profile", profile, "-b", "9bpw", "--quantizer", "rtn", "--json")
    for dtype in ("float16", "bfloat16"):
        planned = cli("plan", checkpoint, *budget, "--dtype", dtype)
        assert planned.exit_code == 0, planned.output
        tiers = {w["tier"] for w in json.loads(planned.stdout)["weights"]}
        assert {"f16", "bf16"} & tiers == {dtype[0] + ("f16" if dtype[0] == "b" else "16")}


TOO_LARGE = {"norm": "model.norm.weight", "weight": "model.layers.0.self_attn.q_proj.weight"}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_values_too_large_for_the_type(cli, tmp_path, case):
    name = TOO_LARGE[case]
    source = tiny.write_gpt_oss(
        tmp_path / "src",
        lambda values: values[name].__setitem__(..., 0x7F00),  # 1.7e38
    )
    out = tmp_path / "out"
    done = cli("quantize", source, "-r", "uniform-4", "--dtype", "float16", "-o", out)
    assert done.exit_code == 2
    assert "NaN or infinite" in done.stderr
    assert not list(tmp_path.glob("out*"))


INFINITE = ["model.norm.weight", "model.layers.0.self_attn.sinks", "model.layers.1.mlp.router.bias"]


@pytest.mark.parametrize("name", INFINITE)
def test_an_infinity_in_an_unquantized_tensor_is_found_while_writing(refused, tmp_path, name):
    source = tiny.write_gpt_oss(tmp_path / "src", lambda values: values[name].fill(0x7F80))
    assert f"{name}: " in (said := refused(source))
    assert "values are NaN or infinite as BF16" in said


def test_other_families_are_cast_alike(tmp_path):
    config = {**LLAMA, "torch_dtype": "bfloat16"}
    source = write_from_model(
        tmp_path / "src", config, lambda name: "F32" if "norm" in name else "F16"
    )
    found = rewritten(source, tmp_path / "out", "uniform-4")
    assert types(found).keys() == {"uint32", "bfloat16"}
    assert same_as_convert(source, tmp_path / "theirs", found, q_bits=4) == []
