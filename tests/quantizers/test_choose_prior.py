"""The prior of Hessians is chosen on inputs that they were not made from."""

import numpy as np
import pytest

from quantkit.backend import mx
from quantkit.formats.tiers import parse_tier
from quantkit.quantizers.choose_prior import Sample, choose, sampled_matrices
from quantkit.quantizers.hessians import DEFAULT_PRIOR, Hessians
from quantkit.quantizers.input_sums import Inputs, InputSums
from quantkit.quantizers.registry import find_quantizer

WIDTH, EXPERTS = 128, 4
TIER = parse_tier("q3g64")
GPTQ, SEARCH = find_quantizer("gptq"), find_quantizer("search")


def sums(x, experts):
    total = InputSums(EXPERTS)
    total.add(Inputs(mx.array(x), experts))
    return total


def correlated(rng, count, roots):
    """Inputs of all experts: `roots` (experts, width, width) mix independent values."""
    experts = rng.integers(0, EXPERTS, count)
    noise = rng.normal(size=(count, WIDTH)).astype(np.float32)
    return np.einsum("ni,nij->nj", noise, roots[experts]).astype(np.float32), experts


def roots_of(rng, own):
    """Square roots of covariances, of which a share is each expert's own."""
    shared, special = (
        rng.normal(size=(n, WIDTH, WIDTH)) * np.exp(rng.normal(size=(1, 1, WIDTH)))
        for n in (1, EXPERTS)
    )
    return (np.sqrt(1 - own) * shared + np.sqrt(own) * special).astype(np.float32)


def sample(rng):
    return Sample(
        mx.array(rng.normal(size=(EXPERTS, 96, WIDTH)).astype(np.float32)), TIER, mx.float32
    )


def loss(one, inputs, validation, choice):
    total = 0.0
    for expert in range(EXPERTS):
        (moments,) = inputs.moments_of([expert], [choice.prior])
        shared = Hessians(moments)
        rows = one.values[expert : expert + 1]
        quantized = choice.quantizer.function()(rows, shared, TIER, mx.float32)
        unseen = Hessians(validation.total(expert)[None])
        total += unseen.loss(rows, quantized.dequantized(TIER)).item()
    return total


@pytest.mark.parametrize("own", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("per_width", [0.2, 1, 8])
def test_never_worse_than_search(own, per_width):
    """However few inputs, and however little the experts have in common."""
    rng = np.random.default_rng(0)
    roots, one = roots_of(rng, own), sample(rng)
    inputs = sums(*correlated(rng, int(per_width * WIDTH * EXPERTS), roots))
    validation = sums(*correlated(rng, 4000, roots))
    choice = choose([one], inputs, validation, GPTQ)
    searched = loss(one, inputs, validation, choice.__class__(DEFAULT_PRIOR, SEARCH))
    assert loss(one, inputs, validation, choice) <= 1.001 * searched


def test_misleading_hessians_lose_to_the_search():
    rng = np.random.default_rng(0)
    inputs = sums(*correlated(rng, 4000, roots_of(rng, 0.0)))
    noise = rng.normal(size=(4000, WIDTH)).astype(np.float32)
    validation = sums(noise, rng.integers(0, EXPERTS, 4000))
    assert choose([sample(rng)], inputs, validation, GPTQ).quantizer is SEARCH


def test_nothing_to_validate_on():
    rng = np.random.default_rng(0)
    inputs = sums(*correlated(rng, 400, roots_of(rng, 0.0)))
    for quantizer in (GPTQ, SEARCH):
        choice = choose([sample(rng)], inputs, InputSums(EXPERTS), quantizer)
        assert choice.prior == DEFAULT_PRIOR
        assert choice.quantizer is quantizer


@pytest.mark.parametrize("count", [1, 3, 4, 32, 128])
def test_sampled_matrices(count):
    some = sampled_matrices(count)
    assert len(some) == min(count, 4)
    assert some == sorted(set(some))
    assert 0 <= some[0] <= some[-1] < count
