import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from quantkit.backend import mx
from quantkit.checkpoint.gpt_oss import stored_tensors
from quantkit.checkpoint.source import open_source
from quantkit.errors import SourceError
from quantkit.formats.codec import to_numpy
from tests.support import tiny

DATA = Path(__file__).parent.parent / "data"
PUBLISHED = {"20b": (459, 20_914_757_184, 13_761_264_768), "120b": (687, 116_829_156_672, 65_248_815_744)}  # fmt: skip
# Of openai/gpt-oss-20b and -120b on the Hub: the first shard's size, header included.
FIRST_SHARD = {"20b": 4_792_272_488, "120b": 4_625_017_896}


def published(size: str) -> tuple[dict, dict]:
    folder = DATA / f"gpt-oss-{size}"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return json.loads((folder / "config.json").read_text()), index


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_layout(size):
    config, index = published(size)
    specs = {spec.name: spec for spec in stored_tensors(config)}
    assert specs.keys() == index["weight_map"].keys()
    assert sum(spec.nbytes for spec in specs.values()) == index["metadata"]["total_size"]
    first = min(index["weight_map"].values())
    held = sum(specs[n].nbytes for n, file in index["weight_map"].items() if file == first)
    assert held < FIRST_SHARD[size] < held + 100_000


@pytest.mark.parametrize("size", PUBLISHED)
def test_inventory_from_headers_alone(size, tmp_path):
    config, index = published(size)
    specs = list(stored_tensors(config))
    folder = tiny.write_headers_only(tmp_path / size, config, specs, index["weight_map"])
    inventory = open_source(str(folder)).inventory
    tensors, parameters, stored = PUBLISHED[size]
    assert len(specs) == tensors
    assert inventory.parameters == parameters
    assert inventory.total_bytes == stored
    layers = config["num_hidden_layers"]
    assert inventory.layers == layers
    assert len(inventory.weights) == 2 + layers * 8
    assert (inventory.experts, inventory.experts_per_token) == (config["num_local_experts"], 4)
    kinds = [w.layer_kind for w in inventory.weights if w.role == "expert_down"]
    assert kinds == config["layer_types"]


def whole(source, name):
    view = source.views[name]
    return source.read(name, 0, view.rows)


def test_published_values_are_those_mlx_lm_makes_of_them(checkpoint):
    from mlx_lm.models.gpt_oss import Model, ModelArgs

    source = open_source(str(checkpoint))
    stored = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        stored.update(mx.load(str(file)))
    model = Model(ModelArgs.from_dict(tiny.CONFIG))
    sanitized = model.sanitize(stored)
    assert sanitized.keys() == source.views.keys()
    for name, expected in sanitized.items():
        carrier = to_numpy(expected)
        assert np.array_equal(whole(source, name).reshape(carrier.shape), carrier), name


def test_fine_tuned_experts_are_transposed_and_split(tmp_path):
    source = open_source(str(tiny.write_gpt_oss(tmp_path / "src", packed=False)))
    stored = {spec.name: values for spec, values in tiny.gpt_oss_tensors(packed=False)}
    at = "model.layers.1.mlp.experts"
    gate_up, down = stored[f"{at}.gate_up_proj"], stored[f"{at}.down_proj"]
    bias = stored[f"{at}.gate_up_proj_bias"]
    for name, expected in {
        "gate_proj.weight": gate_up[:, :, 0::2].swapaxes(1, 2),
        "up_proj.weight": gate_up[:, :, 1::2].swapaxes(1, 2),
        "down_proj.weight": down.swapaxes(1, 2),
        "gate_proj.bias": bias[:, 0::2],
        "up_proj.bias": bias[:, 1::2],
    }.items():
        found = whole(source, f"{at}.{name}")
        assert np.array_equal(found.reshape(expected.shape), expected), name


@pytest.mark.parametrize("packed", [True, False])
def test_rows_read_in_parts_are_the_whole(tmp_path, packed):
    source = open_source(str(tiny.write_gpt_oss(tmp_path / "src", packed=packed)))
    for name, view in source.views.items():
        cuts = range(0, view.rows + 1, view.step)
        parts = [source.read(name, a, b) for a, b in pairwise(cuts)]
        assert np.array_equal(np.concatenate(parts), whole(source, name)), name


def test_fine_tunes_and_published_have_the_same_weights(tmp_path, checkpoint):
    plain = open_source(str(tiny.write_gpt_oss(tmp_path / "src", packed=False))).inventory
    packed = open_source(str(checkpoint)).inventory
    assert [(w.name, w.role, w.shape) for w in plain.weights] == [
        (w.name, w.role, w.shape) for w in packed.weights
    ]
    assert {w.storage for w in plain.weights} == {"bf16"}
    assert plain.parameters == packed.parameters


def broken(change):
    """A list of tensors, changed by name."""
    tensors = {spec.name: (spec, values) for spec, values in tiny.gpt_oss_tensors()}
    change(tensors)
    return list(tensors.values())


def retyped(dtype):
    def change(tensors):
        spec, values = tensors["model.norm.weight"]
        tensors["model.norm.weight"] = (type(spec)(spec.name, dtype, spec.shape), values.view("u2"))

    return change


def reshaped(tensors):
    name = "model.layers.1.self_attn.q_proj.weight"
    spec, values = tensors[name]
    tensors[name] = (type(spec)(name, "BF16", (64, 256)), values)


def unknown(tensors):
    spec, values = tensors["model.norm.weight"]
    tensors["extra"] = (type(spec)("extra", "BF16", spec.shape), values)


BROKEN = {
    "scales missing": (
        lambda t: t.pop("model.layers.2.mlp.experts.down_proj_scales"),
        r"down_proj_scales' is missing, but its blocks are present",
    ),
    "blocks missing": (
        lambda t: t.pop("model.layers.2.mlp.experts.gate_up_proj_blocks"),
        r"gate_up_proj_blocks' is missing, but its scales are present",
    ),
    "tensor missing": (
        lambda t: t.pop("model.layers.3.self_attn.sinks"),
        r"'model.layers.3.self_attn.sinks' is missing",
    ),
    "wrong dtype": (retyped("U16"), r"'model.norm.weight' is U16; expected BF16, F16 or F32"),
    "wrong shape": (reshaped, r"has shape \[64, 256\], but config.json implies \[128, 128\]"),
    "unknown tensor": (unknown, r"'extra' is not part of a gpt_oss model"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoint(tmp_path, refused, case):
    change, message = BROKEN[case]
    folder = tiny.write_checkpoint(tmp_path / "src", tiny.CONFIG, broken(change))
    assert re.search(message, refused(folder))


@pytest.mark.parametrize("key", ["hidden_size", "num_local_experts", "num_hidden_layers"])
@pytest.mark.parametrize("value", [None, 0, -3, "64", True])
def test_config_that_says_nothing(tmp_path, key, value):
    folder = tiny.write_gpt_oss(tmp_path / "src")
    (folder / "config.json").write_text(json.dumps({**tiny.CONFIG, key: value}))
    with pytest.raises(SourceError, match=f"config.json: '{key}' is missing or not a positive"):
        open_source(str(folder))
