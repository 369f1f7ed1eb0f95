"""Architectures that only mlx-lm knows."""

import json

import numpy as np
import pytest

from quantkit.backend import mx
from quantkit.checkpoint.source import open_source
from quantkit.errors import SourceError
from quantkit.evaluation.verify import verify
from quantkit.formats.tiers import TensorSpec
from quantkit.planning.recipe import load_recipe, parse_recipe, plan_by_recipe
from tests.support import tiny
from tests.support.families import LLAMA, MOE, specs, tensors, write
from tests.support.repo import write_repo


def test_dense_inventory(tmp_path):
    inventory = open_source(str(write(tmp_path / "src", LLAMA))).inventory
    roles = {w.name: w.role for w in inventory.weights if not w.layer}
    assert roles == {
        "model.embed_tokens": "embedding",
        "model.layers.0.self_attn.q_proj": "q",
        "model.layers.0.self_attn.k_proj": "k",
        "model.layers.0.self_attn.v_proj": "v",
        "model.layers.0.self_attn.o_proj": "o",
        "model.layers.0.mlp.gate_proj": "mlp_gate",
        "model.layers.0.mlp.up_proj": "mlp_up",
        "model.layers.0.mlp.down_proj": "mlp_down",
    }
    assert inventory.tied
    assert inventory.parameters == sum(np.prod(spec.shape) for spec in specs(LLAMA))


def test_a_tied_embedding_is_read_whole_for_every_token(tmp_path):
    inventory = open_source(str(write(tmp_path / "src", LLAMA))).inventory
    plan = plan_by_recipe(inventory, load_recipe("mxfp4-q8"))
    assert plan.active_bytes == plan.total_bytes


def test_moe_inventory(tmp_path):
    inventory = open_source(str(write(tmp_path / "src", MOE))).inventory
    weights = {w.name: w for w in inventory.weights}
    up = weights["model.layers.0.mlp.switch_mlp.up_proj"]
    assert (up.role, up.layer, up.shape, up.storage) == ("expert_up", 0, (4, 64, 64), "bf16")
    assert weights["model.layers.0.mlp.gate"].role == "router"
    assert weights["model.layers.1.mlp.up_proj"].role == "mlp_up"
    assert (inventory.experts, inventory.experts_per_token) == (4, 2)
    assert inventory.parameters == sum(np.prod(spec.shape) for spec in specs(MOE))
    plan = plan_by_recipe(inventory, load_recipe("mxfp4-q8"))
    assignment = next(c for c in plan.assignments if c.name == up.name)
    assert assignment.active_bytes * 2 == assignment.bytes


@pytest.mark.parametrize("config", [LLAMA, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_the_main_job(tmp_path, config, dtype):
    from mlx_lm import convert

    folder = write(tmp_path / "src", config, dtype)
    source = open_source(str(folder))
    recipe = parse_recipe("q8", {"rules": [{"tier": "q8g64"}]})
    plan = plan_by_recipe(source.inventory, recipe)
    report = write_repo(source, plan, tmp_path / "out", shard_bytes=100_000)
    checks = list(verify(tmp_path / "out", report))
    assert all(check.ok for check in checks), checks

    convert(str(folder), str(tmp_path / "theirs"), quantize=True, q_bits=8, q_group_size=64)
    ours, theirs = tensors(tmp_path / "out"), tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]) for name in theirs)


def test_untouched_stacks_are_the_stored_experts(tmp_path):
    source = open_source(str(write(tmp_path / "src", MOE)))
    plan = plan_by_recipe(source.inventory, parse_recipe("n", {"rules": [{"tier": "native"}]}))
    assert plan.total_bytes == source.inventory.total_bytes
    write_repo(source, plan, tmp_path / "out")
    ours = tensors(tmp_path / "out")["model.layers.0.mlp.switch_mlp.down_proj.weight"]
    stored = tensors(tmp_path / "src")
    for expert in range(4):
        one = stored[f"model.layers.0.mlp.experts.{expert}.down_proj.weight"]
        assert mx.array_equal(ours[expert], one)
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_values_that_sanitize_transposes(tmp_path):
    """GPT-2 stores its matrices the other way round."""
    config = {
        "model_type": "gpt2",
        "n_ctx": 32,
        "n_embd": 64,
        "n_head": 2,
        "n_layer": 1,
        "n_positions": 32,
        "vocab_size": 64,
        "layer_norm_epsilon": 1e-5,
        "eos_token_id": 1,
    }
    shapes = {"wte.weight": (64, 64), "wpe.weight": (32, 64)}
    for norm in ("ln_f", "h.0.ln_1", "h.0.ln_2"):
        shapes |= {f"{norm}.weight": (64,), f"{norm}.bias": (64,)}
    for name, n_in, n_out in (
        *(("attn.c_attn", 64, 192), ("attn.c_proj", 64, 64)),
        *(("mlp.c_fc", 64, 256), ("mlp.c_proj", 256, 64)),
    ):
        shapes |= {f"h.0.{name}.weight": (n_in, n_out), f"h.0.{name}.bias": (n_out,)}
    rng = np.random.default_rng(0)
    made = [TensorSpec(name, "F16", shape) for name, shape in shapes.items()]
    folder = tiny.write_checkpoint(
        tmp_path / "src", config, [(spec, tiny.random_values(spec, rng)) for spec in made]
    )
    source = open_source(str(folder))
    for tier in ("native", "q4g64"):
        plan = plan_by_recipe(source.inventory, parse_recipe("n", {"rules": [{"tier": tier}]}))
        report = write_repo(source, plan, tmp_path / tier)
        checks = list(verify(tmp_path / tier, report))
        assert all(check.ok for check in checks), checks
    ours, stored = tensors(tmp_path / "native"), tensors(tmp_path / "src")
    assert mx.array_equal(
        ours["model.h.0.mlp.c_fc.weight"], stored["h.0.mlp.c_fc.weight"].swapaxes(0, 1)
    )


def edited(folder, **values):
    (folder / "config.json").write_text(json.dumps({**LLAMA, **values}))
    return str(folder)


def test_unknown_model_type(tmp_path, refused):
    folder = write(tmp_path / "src", LLAMA)
    line = refused(edited(folder, model_type="nonesuch"))
    assert "mlx-lm cannot build model_type 'nonesuch'" in line


@pytest.mark.parametrize("heads", [0, "two", None, [2], 10**400])
def test_config_that_makes_no_model(tmp_path, refused, heads):
    folder = write(tmp_path / "src", LLAMA)
    assert "config.json" in refused(edited(folder, num_attention_heads=heads))


def test_config_that_mlx_lm_refuses(tmp_path):
    folder = write(tmp_path / "src", LLAMA)
    config = {k: v for k, v in LLAMA.items() if k != "hidden_size"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"cannot build model_type 'llama'.*hidden_size"):
        open_source(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, r"'model.layers.2\S+ is missing, like 8 others"),
        ({"num_hidden_layers": 1}, r"'model.layers.1\S+ is not part of the model"),
        ({"intermediate_size": 96}, r"has shape \[128, 64\], but config.json implies \[96, 64\]"),
    ],
)
def test_checkpoint_that_mlx_lm_would_not_load(tmp_path, change, message):
    folder = write(tmp_path / "src", LLAMA)
    with pytest.raises(SourceError, match=message):
        open_source(edited(folder, **change))


def test_types_that_are_not_read(tmp_path):
    values = [
        (TensorSpec(s.name, "F8_E4M3", s.shape), np.zeros(s.shape, np.uint8)) for s in specs(LLAMA)
    ]
    folder = tiny.write_checkpoint(tmp_path / "src", LLAMA, values)
    with pytest.raises(SourceError, match="tensors of type F8_E4M3 cannot be read"):
        open_source(str(folder))


@pytest.mark.parametrize("value", ["x", 5, ["a"], {"layer_types": 7}])
def test_text_config_of_another_kind(tmp_path, value):
    """It says nothing about this model, and does no harm."""
    folder = write(tmp_path / "src", LLAMA)
    inventory = open_source(edited(folder, text_config=value)).inventory
    assert {weight.layer_kind for weight in inventory.weights} == {None}
