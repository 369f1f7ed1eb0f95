"""Integers are packed as MLX packs them, in little memory."""

import numpy as np
import pytest

from quantkit.backend import mx
from quantkit.backend.memory_limits import MemoryLimits
from quantkit.formats.affine import AffineWeight
from quantkit.formats.tiers import TIERS

AFFINE = [tier for tier in TIERS.values() if tier.mode == "affine"]


def weight(shape, tier):
    values = np.random.default_rng(0).integers(0, 2**tier.bits, shape, np.uint8)
    groups = (*shape[:-1], shape[-1] // tier.group_size)
    return AffineWeight(mx.array(values), mx.ones(groups), mx.zeros(groups))


@pytest.mark.parametrize("limit", [100, 16_000_000])
@pytest.mark.parametrize("tier", AFFINE, ids=str)
def test_mlx_unpacks_the_integers(tier, limit, monkeypatch):
    limits = MemoryLimits(decoded_values=limit)
    monkeypatch.setattr("quantkit.formats.affine.memory_limits", lambda: limits)
    affine = weight((3, 5, 128), tier)
    packed, scales, biases = affine.packed(tier)
    assert packed.shape == (3, 5, 4 * tier.bits)
    values = mx.dequantize(packed, scales, biases, tier.group_size, tier.bits)
    assert mx.array_equal(values, affine.q).item()


def test_a_large_stack_is_packed_in_parts(monkeypatch):
    tier = TIERS["q4g32"]
    affine = weight((4, 512, 1024), tier)
    limits = MemoryLimits(decoded_values=affine.q.size // 16)
    monkeypatch.setattr("quantkit.formats.affine.memory_limits", lambda: limits)
    mx.eval(affine.q, affine.scales, affine.biases)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(affine.packed(tier))
    assert mx.get_peak_memory() - before < 2.5 * affine.q.size
