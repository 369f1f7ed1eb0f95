"""What calibrated quantizers lose next to rounding to nearest, and what a profile says of it."""

import json
from dataclasses import replace

import numpy as np
import pytest

from quantkit.artifacts.sensitivity import SensitivityProfile
from quantkit.backend import mx
from quantkit.calibration.calibration_set import CalibrationSpec
from quantkit.checkpoint.source import open_source
from quantkit.errors import ProfileError
from quantkit.quantizers.input_sums import Inputs
from quantkit.quantizers.registry import QUANTIZERS
from quantkit.sensitivity import measure
from quantkit.sensitivity.entries import candidate_entries
from quantkit.sensitivity.measure import ProfileSettings
from quantkit.sensitivity.quantizer_losses import inputs_of, sampled_layers, sampled_losses
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.layer_trace import hooked
from tests.support.text import rows

TIERS = ("q4g32", "q2g32")


@pytest.fixture
def traced(checkpoint):
    """The first layer's weights, and its runs on eight sequences in two batches."""
    model = StreamingModel(open_source(str(checkpoint)))
    weights = {w.role: w for w in model.weights.values() if w.layer == 0}
    calls = []
    tokens = mx.random.randint(0, 64, (8, 20), key=mx.random.key(0))
    model.run(tokens, lambda _n, call, _y: calls.append(call))
    names = [w.name for w in weights.values()]
    stacks = [w.name for w in weights.values() if len(w.shape) > 2]
    with hooked(model.layers[0], names, stacks) as module:
        call = calls[0]
        halves = [type(call)(x, call.args, call.kwargs) for x in (call.x[:5], call.x[5:])]
        yield model, weights, [module.record(half) for half in halves]


def test_every_input_has_its_sequence(traced):
    _, weights, traces = traced
    for role, per_token in (("q", 1), ("router", 1), ("expert_gate", 2), ("expert_down", 2)):
        numbers = np.concatenate([s for _, s in inputs_of(weights[role], traces)])
        assert np.bincount(numbers).tolist() == [20 * per_token] * 8, role


def test_calibrated_quantizers_lose_less_on_unseen_sequences(traced):
    """Where there is enough text: the inputs of one sequence say little of another's here."""
    model, weights, _ = traced
    weight = weights["q"]
    entries = candidate_entries([weight], TIERS)
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((weight.shape[-1],) * 2)
    x = mx.array((rng.standard_normal((4096, weight.shape[-1])) @ mixed).astype(np.float32))
    pairs = [(Inputs(x), np.arange(4096) // 64)]
    losses = sampled_losses([weight], model.values, entries, pairs)
    assert set(losses) == {(name, "q", tier) for name in QUANTIZERS for tier in TIERS}
    for tier in TIERS:
        nearest, search, gptq = (losses[name, "q", tier] for name in ("rtn", "search", "gptq"))
        assert gptq < 0.8 * nearest
        assert gptq < search


def test_too_little_text_gives_no_losses(traced):
    model, weights, traces = traced
    pair = [weights["expert_gate"], weights["expert_up"]]
    entries = candidate_entries(pair, ["q2g32"])
    inputs = list(inputs_of(pair[0], traces))
    together = sampled_losses(pair, model.values, entries, inputs)
    assert {role for _, role, _ in together} == {"expert_gate", "expert_up"}
    alone = sampled_losses(pair[1:], model.values, entries, inputs)
    assert alone == pytest.approx({key: together[key] for key in alone}, rel=1e-4)
    one = [(rows_, 0 * sequences) for rows_, sequences in inputs]
    assert not sampled_losses(pair, model.values, entries, one)


def test_a_few_layers_are_sampled():
    assert sampled_layers(24) == {6, 18}
    assert sampled_layers(2) == {0, 1}
    assert sampled_layers(1) == {0}


def test_the_profile_has_ratios_for_every_role(cli, checkpoint, tmp_path):
    text = rows(tmp_path / "text.jsonl", seed=0, count=40, length=60)
    out = tmp_path / "p"
    options = ["--calibration", text, "--tokens", "192", "--sequence-length", "24"]
    cli("profile", checkpoint, "-o", out, *options, "--tiers", "q3g64")
    cli("profile", checkpoint, "-o", out, *options, "--tiers", "q2g32")
    made = json.loads((out / "profile.json").read_text())
    roles = {w["role"] for w in made["weights"]} - {"embedding"}
    for quantizer in ("search", "gptq"):
        table = made["quantizer_ratios"][quantizer]
        assert set(table) == roles
        for role, by_tier in table.items():
            assert set(by_tier) <= {"q3g64", "q2g32"}
            assert all(0 < ratio < 10 for ratio in by_tier.values()), role
        assert set(table["expert_down"]) == {"q3g64", "q2g32"}
    again = SensitivityProfile.from_json(made, "p")
    assert json.loads(json.dumps(again.to_json())) == made
    made["quantizer_ratios"]["gptq"]["q"]["q2g32"] = -1
    with pytest.raises(ProfileError, match="impossible ratio"):
        SensitivityProfile.from_json(made, "p")


def test_more_text_than_the_profiles_compares_quantizers(checkpoint, tmp_path):
    """It begins with the profile's own, and a profile of another quantizer needs none."""
    source = open_source(str(checkpoint))
    text = rows(tmp_path / "text.jsonl", seed=0, count=40, length=60)
    settings = ProfileSettings(CalibrationSpec(str(text), 96, 24))
    profiling = measure.prepare(source, tmp_path / "p", settings)
    assert profiling.more_tokens.shape == (16, 24)
    assert np.array_equal(profiling.more_tokens[:4], profiling.calibration.tokens)
    other = measure.prepare(source, tmp_path / "p", replace(settings, quantizer="search"))
    assert other.more_tokens is None


@pytest.mark.parametrize(
    ("profiled", "compared"), [(512, 2048), (1024, 4096), (2048, 4096), (8192, 8192)]
)
def test_the_text_to_compare_on_is_limited(profiled, compared):
    assert measure._compared_tokens(profiled) == compared
