"""Sums of inputs: over chunks, of experts that see little, and of inputs that wait on disk."""

import numpy as np
import pytest

from quantkit.artifacts.inventory import Weight
from quantkit.backend import mx
from quantkit.backend.memory_limits import limited_memory
from quantkit.quantizers.hessians import PRIORS, Prior
from quantkit.quantizers.input_sums import DiskSpool, Inputs, InputSums, MemorySpool, has_inputs
from quantkit.streaming.layer_trace import ModuleCall


def calls(x, experts, size):
    """Inputs of a stack, a few at a time."""
    for start in range(0, len(x), size):
        some = slice(start, start + size)
        yield Inputs(mx.array(x[some]), experts[some])


def inputs(width=8, count=300, experts=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, width)).astype(np.float32)
    return x, rng.integers(0, experts, count)


@pytest.mark.parametrize("prior", PRIORS)
def test_experts_that_saw_little(prior):
    """Shrunk towards that of all inputs; one that saw nothing has that, one that saw much its own."""
    x, _ = inputs(count=3000)
    experts = np.array([0] * 2999 + [1])
    sums = InputSums(3)
    for call in calls(x, experts, 500):
        sums.add(call)
    ((part, found),) = sums.moments(prior)
    assert part == slice(0, 3)
    assert sums.counts.tolist() == [2999, 1, 0]
    pooled = x.T @ x / 3000
    nothing = np.array(found[2])
    assert np.allclose(nothing / np.trace(nothing), pooled / np.trace(pooled), atol=1e-5)
    assert np.allclose(np.array(found[0]), x[:2999].T @ x[:2999] / 2999, atol=0.02)
    alone = np.outer(x[2999], x[2999])
    assert np.abs(np.array(found[1]) - pooled).max() < np.abs(alone - pooled).max()
    assert all(np.linalg.eigvalsh(np.array(h)).min() > 0 for h in found)


@pytest.mark.parametrize("spool", ["memory", "disk"])
@pytest.mark.parametrize("size", [7, 100, 300])
def test_any_chunks_and_any_memory_give_the_same(tmp_path, spool, size):
    """With little memory a few experts at a time, from inputs that waited."""
    x, experts = inputs(width=512)
    whole = InputSums(3)
    for call in calls(x, experts, 300):
        whole.add(call)
    waiting = MemorySpool() if spool == "memory" else DiskSpool(tmp_path / "inputs.f32")
    with limited_memory(250_000_000):
        sums = InputSums(40, waiting)
        for call in calls(x, experts, size):
            sums.add(call)
        parts = list(sums.moments(PRIORS[0]))
    assert len(parts) > 1
    found = mx.concatenate([hessian for _, hessian in parts])
    ((_, expected),) = whole.moments(PRIORS[0])
    assert sums.counts[:3].tolist() == whole.counts.tolist()
    assert np.allclose(np.array(found[:3]), np.array(expected), atol=1e-4)
    if spool == "disk":
        assert (tmp_path / "inputs.f32").stat().st_size == x.nbytes
        waiting.remove()
        assert not list(tmp_path.iterdir())


def test_a_plain_matrix_pools_its_own():
    x, _ = inputs()
    sums = InputSums(1)
    for start in (0, 100, 200):
        sums.add(Inputs(mx.array(x[start : start + 100])))
    own = x.T @ x / 300
    ((_, found),) = sums.moments(Prior(3, 3))
    expected = (300 * own + 24 * own + 24 * np.diag(np.diag(own))) / 348
    assert np.allclose(np.array(found[0]), expected, atol=1e-5)


def test_only_some_experts():
    x, experts = inputs()
    few, whole = InputSums(3, only=[1]), InputSums(3)
    for call in calls(x, experts, 50):
        few.add(call)
        whole.add(call)
    assert np.allclose(np.array(few.total(1)), np.array(whole.total(1)), atol=1e-4)
    assert few.counts.tolist() == whole.counts.tolist()


def test_stacks_without_experts_have_no_inputs():
    """Of a stack that is called without indices nobody knows which matrix saw what."""
    x = mx.zeros((2, 4))
    stack = Weight("w", "experts_up", 0, 2, (2, 4, 4), "bf16", 64)
    assert not has_inputs(stack, [ModuleCall("w", (x,), x)])
    assert has_inputs(stack, [ModuleCall("w", (x, mx.zeros((2, 1), mx.int32)), x)])
    assert has_inputs(Weight("w", "q", 0, None, (4, 4), "bf16", 32), [ModuleCall("w", (x,), x)])


def test_native_inputs_stand_below(tmp_path):
    """Sums of (x_native - x) x^T, with little memory from inputs that waited."""
    x, experts = inputs(width=512)
    native = x + np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    spool = DiskSpool(tmp_path / "inputs.f32")
    with limited_memory(250_000_000):
        waiting, whole = InputSums(40, spool), InputSums(3)
        for start in range(0, 300, 50):
            some = slice(start, start + 50)
            for sums in (waiting, whole):
                sums.add(Inputs(mx.array(x[some]), experts[some]), mx.array(native[some]))
    own = experts == 1
    expected = np.concatenate([x[own].T @ x[own], (native - x)[own].T @ x[own]])
    for sums in (waiting, whole):
        assert np.allclose(np.array(sums.total(1)), expected, atol=1e-3)
        (moments,) = sums.moments_of([1], [PRIORS[0]])
        assert moments.shape == (1, 1024, 512)
