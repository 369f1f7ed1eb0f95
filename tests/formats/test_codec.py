import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.backend import mx
from quantkit.backend.memory_limits import MemoryLimits
from quantkit.errors import TierError
from quantkit.formats import mxfp4
from quantkit.formats.codec import decode, decode_mxfp4, encode, fake_quantize, to_mx, to_numpy
from quantkit.formats.tiers import MXFP4, TIERS, parse_tier

# Relative squared error on Gaussian weights: measured, with a third to spare.
WORST = {
    "q1g32": 2.6, "q1g64": 3.6,  # the extremes of a group, where a quantizer has better ones
    "q2g32": 0.19, "q2g64": 0.22, "q3g32": 0.042, "q3g64": 0.053, "q4g32": 0.010, "q4g64": 0.012,
    "q5g64": 0.0030, "q6g64": 0.0008, "q8g64": 1e-4, "mxfp4": 0.020, "mxfp8": 0.0015,
    "nvfp4": 0.013, "bf16": 4e-6,
}  # fmt: skip


@pytest.mark.parametrize("name", WORST)
def test_error_of_each_tier(name):
    tier = parse_tier(name)
    weight = mx.random.normal((64, 512), key=mx.random.key(0)).astype(mx.bfloat16)
    back = decode(encode(weight, tier), tier, "F32")
    exact = weight.astype(mx.float32)
    error = (mx.square(back - exact).sum() / mx.square(exact).sum()).item()
    assert error <= WORST[name]
    assert name == "bf16" or error > 0


@pytest.mark.parametrize("tier", [t for t in TIERS.values() if t.quantized], ids=str)
def test_encoding_is_mlx_own(tier):
    weight = mx.random.normal((8, 256), key=mx.random.key(1)).astype(mx.bfloat16)
    ours, theirs = encode(weight, tier), mx.quantize(weight, tier.group_size, tier.bits, tier.mode)
    assert all(mx.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_tier_that_does_not_fit():
    with pytest.raises(TierError, match="does not fit"):
        encode(mx.zeros((4, 96)), parse_tier("q4g64"))


def test_every_mxfp4_value_decodes_as_mlx_decodes_it():
    # 32 bytes hold 64 of the 256 possible pairs: 8 blocks a scale cover every byte.
    packed = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (250, 1))
    scales = np.repeat(np.arange(2, 252, dtype=np.uint8), 16)[:, None]
    words = packed.view(np.uint32)
    table = to_mx(mxfp4.to_bfloat16(words, scales), "BF16")
    theirs = decode((mx.array(words), mx.array(scales)), MXFP4, "BF16")
    assert mx.array_equal(table, theirs)
    assert mx.array_equal(decode_mxfp4(words, scales), theirs)


def test_nan_and_overflowing_scales_are_seen():
    packed = np.full((1, 8), 0x77777777, np.uint32)  # 16 blocks' worth of magnitude 6
    packed = packed[:, :4]
    assert mxfp4.nonfinite(packed, np.array([[120]], np.uint8)) == 0
    assert mxfp4.nonfinite(packed, np.array([[255]], np.uint8)) == 32
    assert mxfp4.nonfinite(packed, np.array([[254]], np.uint8)) == 32


@given(st.integers(0, 2**32 - 1), st.integers(-20, 20))
@settings(max_examples=50, deadline=None)
def test_mxfp4_values_survive_encoding(seed, exponent):
    rng = np.random.default_rng(seed)
    values = np.ldexp(rng.choice(mxfp4.MAGNITUDES, (4, 64)), exponent).astype(np.float32)
    values[:, ::32] = np.ldexp(np.float32(6), exponent)
    values *= rng.choice(np.array([-1, 1], np.float32), values.shape)
    back = mxfp4.to_bfloat16(*mxfp4.encode(values))
    assert np.array_equal((back.astype(np.uint32) << 16).view(np.float32), values)


def test_mxfp4_encoding_beats_mlx_own_rounding():
    values = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    ours = to_mx(mxfp4.to_bfloat16(*mxfp4.encode(values)), "BF16").astype(mx.float32)
    theirs = decode(encode(mx.array(values), MXFP4), MXFP4, "F32")

    def error(back: mx.array) -> float:
        return mx.square(back - mx.array(values)).sum().item()

    assert error(ours) <= error(theirs)


def test_zero_blocks_encode_to_zero():
    back = mxfp4.to_bfloat16(*mxfp4.encode(np.zeros((2, 64), np.float32)))
    assert not back.any()


@pytest.mark.parametrize(
    ("dtype", "kind"), [("BF16", np.uint16), ("F16", np.float16), ("F32", "f4")]
)
def test_carriers_go_there_and_back(dtype, kind):
    carrier = np.arange(6, dtype=kind).reshape(2, 3)
    assert np.array_equal(to_numpy(to_mx(carrier, dtype)), carrier)


def test_a_large_stack_is_rounded_in_parts(monkeypatch):
    weight = mx.random.normal((3, 8, 64), key=mx.random.key(0)).astype(mx.bfloat16)
    whole, packed = fake_quantize(weight, TIERS["q3g32"]), encode(weight, TIERS["q3g32"])
    limits = MemoryLimits(decoded_values=100)
    monkeypatch.setattr("quantkit.formats.codec.memory_limits", lambda: limits)
    assert mx.array_equal(fake_quantize(weight, TIERS["q3g32"]), whole)
    for ours, theirs in zip(encode(weight, TIERS["q3g32"]), packed, strict=True):
        assert mx.array_equal(ours, theirs)
    assert mx.abs(whole - weight).max().item() < 0.6
