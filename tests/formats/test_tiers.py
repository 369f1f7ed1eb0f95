import mlx.core as mx
import numpy as np
import pytest

from quantkit.errors import TierError
from quantkit.formats import tiers
from quantkit.formats.tiers import (
    BF16,
    MXFP4,
    NATIVE,
    TIERS,
    canonical,
    parse_tier,
    resolve,
)

QUANTIZED = [tier for tier in TIERS.values() if tier.quantized]


@pytest.mark.parametrize("tier", QUANTIZED, ids=str)
@pytest.mark.parametrize("shape", [(8, 128), (3, 5, 256)])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_tensors_are_what_mlx_makes(tier, shape, dtype):
    kinds = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
    weight = mx.random.normal(shape).astype(kinds[dtype])
    made = mx.quantize(weight, tier.group_size, tier.bits, tier.mode)
    specs = tier.tensors("w", shape, dtype)

    assert [spec.shape for spec in specs] == [array.shape for array in made]
    assert [spec.nbytes for spec in specs] == [array.nbytes for array in made]
    names = {"U32": mx.uint32, "U8": mx.uint8, **kinds}
    assert [names[spec.dtype] for spec in specs] == [array.dtype for array in made]
    assert tier.stored_bytes(shape, dtype) == sum(array.nbytes for array in made)


@pytest.mark.parametrize(
    ("name", "bits_per_weight"),
    [
        *[("q8g64", 8.5), ("q3g64", 3.5), ("q2g32", 3.0), ("q4g128", 4.25), ("mxfp4", 4.25)],
        *[("mxfp8", 8.25), ("nvfp4", 4.5), ("bf16", 16.0)],
        *[("q1g32", 2.0), ("q1g64", 1.5), ("q1g128", 1.25)],
    ],
)
def test_bits_per_weight(name, bits_per_weight):
    shape = (4, 256)
    assert parse_tier(name).stored_bytes(shape) * 8 / np.prod(shape) == bits_per_weight


def test_group_size_128_does_not_exist_for_gpt_oss():
    assert not parse_tier("q4g128").fits((2880, 2880))
    assert parse_tier("q4g64").fits((2880, 2880))
    with pytest.raises(
        TierError, match=r"layers\.0: tier q4g128 does not fit shape \[2880, 2880\]"
    ):
        parse_tier("q4g128").tensors("layers.0", (2880, 2880), "BF16")


@pytest.mark.parametrize("name", ["q7g64", "q4", "q4g16", "", "int4"])
def test_unknown_tier(name):
    with pytest.raises(TierError, match="unknown tier"):
        parse_tier(name)


def test_names_parse_back():
    for name, tier in TIERS.items():
        assert parse_tier(name) is tier
        assert parse_tier(f" {name.upper()} ") is tier


def test_native_is_what_the_source_holds():
    assert resolve(NATIVE, MXFP4) is MXFP4
    assert resolve(NATIVE, BF16) is BF16
    assert canonical(MXFP4, MXFP4) is NATIVE
    assert canonical(NATIVE, MXFP4) is NATIVE
    assert canonical(NATIVE, BF16) is BF16
    assert canonical(BF16, MXFP4) is BF16
    assert canonical(MXFP4, BF16) is MXFP4


def test_config_entry_always_spells_the_mode():
    assert parse_tier("q6g32").config_entry() == {"group_size": 32, "bits": 6, "mode": "affine"}
    assert parse_tier("nvfp4").config_entry() == {"group_size": 16, "bits": 4, "mode": "nvfp4"}


def test_one_bit_needs_a_new_mlx(monkeypatch, cli, checkpoint, tmp_path):
    """An older mlx is not offered such tiers, and named in the error of one who asks for them."""
    installed = {"mlx": "0.32.3"}
    monkeypatch.setattr(tiers, "version", lambda package: installed[package])
    q1 = parse_tier("q1g64")
    assert not tiers.is_available(q1)
    assert tiers.is_available(parse_tier("q2g64"))
    recipe = tmp_path / "one.toml"
    recipe.write_text('[[rules]]\nroles = ["expert"]\ntier = "q1g64"\n[[rules]]\ntier = "native"\n')
    refused = cli("plan", checkpoint, "-r", recipe)
    assert refused.exit_code == 2
    assert "tier q1g64 needs mlx 0.32.4, installed is 0.32.3" in refused.stderr
    asked = cli("profile", checkpoint, "-o", tmp_path / "out", "--tiers", "q1g64")
    assert asked.exit_code == 2
    assert "needs mlx 0.32.4" in asked.stderr
    installed["mlx"] = "0.33.0"
    assert tiers.is_available(q1)
    assert tiers.required_mlx(["q1g64", "q4g64", "native"]) == "0.32.4"
    assert tiers.required_mlx(["q4g64", "bf16"]) is None
