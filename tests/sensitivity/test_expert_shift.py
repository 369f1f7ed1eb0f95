"""Expert-shift: predictions know that changes make routers choose other experts."""

import json
from dataclasses import replace
from importlib.metadata import version

import pytest

from quantkit.artifacts.sensitivity import SensitivityProfile
from quantkit.backend import mx
from quantkit.calibration.calibration_set import CalibrationSpec, read_calibration_set
from quantkit.checkpoint.source import open_source
from quantkit.errors import ProfileError
from quantkit.formats.tiers import parse_tier
from quantkit.jobs.profile import profile as make_profile
from quantkit.planning.allocator import plan_by_budget
from quantkit.planning.budget import Budget
from quantkit.planning.constraints import Constraints
from quantkit.planning.plan import read_plan, unedited_plan, with_predictions
from quantkit.progress import Progress
from quantkit.sensitivity.expert_shift import expert_shift_text, small_changes, text_to_check
from quantkit.sensitivity.measure import ProfileSettings
from quantkit.sensitivity.validation import predictions
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.measure_kl import measure_kl
from tests.support import standin
from tests.support.families import LLAMA, write
from tests.support.profiles import made_up

pytestmark = pytest.mark.skipif(
    version("mlx-lm").startswith("0.31"), reason="mlx-lm differentiates its expert indices there"
)

SETTINGS = ProfileSettings(CalibrationSpec(tokens=96, sequence_length=24), tiers=("q8g32", "q4g32"))


@pytest.fixture(scope="module")
def source(checkpoint):
    return open_source(str(checkpoint))


def of_all(profile, tiers):
    return {w.name: w.by_tier[tiers[w.name].tier].kl for w in profile.weights if w.name in tiers}


def test_many_small_changes_are_predicted_as_they_are_measured(source, tmp_path):
    """The factor is the one by which costs and expert-shift give the measured KL divergence."""
    profile = make_profile(source, tmp_path / "p", SETTINGS)
    assert profile.expert_shift_factor > 0
    changes = small_changes(profile, 5e-4)
    tokens = expert_shift_text(source.checkpoint, SETTINGS.text)
    tiers = {name: parse_tier(cost.tier) for name, cost in changes.items()}
    (measured,) = measure_kl(StreamingModel(source), mx.array(tokens), [tiers], lambda _: None)
    costs = of_all(profile, changes)
    predicted = sum(costs.values()) + profile.expert_shift(costs)
    assert len(costs) > 2
    assert predicted == pytest.approx(float(measured.mean()), rel=1e-4)
    again = SensitivityProfile.from_json(profile.to_json(), "again")
    assert again.expert_shift_factor == profile.expert_shift_factor


@pytest.mark.parametrize(("profiled", "shape"), [(128, (8, 128)), (2048, (4, 256))])
def test_its_text_is_short_and_read_by_nothing_else(tmp_path, profiled, shape):
    """However long the sequences of the profile are, which the shipped text could not fill."""
    source = open_source(str(standin.write_own(tmp_path / "src")))
    spec = CalibrationSpec(tokens=600, sequence_length=profiled)
    tokens = expert_shift_text(source.checkpoint, spec)
    assert tokens.shape == shape
    short = replace(spec, sequence_length=shape[1])
    for other in (
        text_to_check(source.checkpoint, short, tokens),
        read_calibration_set(source.checkpoint, short).tokens,
    ):
        assert other.shape == (600 // shape[1], shape[1])
        assert not {row.tobytes() for row in tokens} & {row.tobytes() for row in other}


def test_a_dense_model_has_none(tmp_path):
    source = open_source(str(write(tmp_path / "src", LLAMA)))
    profile = make_profile(source, tmp_path / "p", SETTINGS)
    assert small_changes(profile, 5e-4)
    assert profile.expert_shift_factor is None


@pytest.mark.parametrize("other", [{"method": "kl"}, {"quantizer": "search"}])
def test_it_is_measured_beside_costs_of_gradients_to_nearest_only(source, tmp_path, other):
    """Measured costs have it; those of a calibrated quantizer would need its quantized weights."""
    profile = make_profile(source, tmp_path / "p", replace(SETTINGS, **other))
    assert profile.expert_shift_factor is None


class Notes(Progress):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def test_a_profile_without_it_is_used_and_named(source, tmp_path):
    make_profile(source, tmp_path / "p", SETTINGS)
    path = tmp_path / "p" / "profile.json"
    data = json.loads(path.read_text())
    del data["expert_shift_factor"]
    path.write_text(json.dumps(data))
    progress = Notes()
    assert make_profile(source, tmp_path / "p", SETTINGS, progress=progress).weights
    assert any("lacks expert-shift" in note for note in progress.notes)


def test_small_changes_share_a_limit(source):
    """The costliest tier of every weight below one limit, and no more in sum than is asked."""
    profile = made_up(source.inventory)
    costs = sorted(cost.kl for w in profile.weights for cost in w.costs if cost.kl > 0)
    most = sum(costs) / 4
    chosen = small_changes(profile, most)
    limit = max(cost.kl for cost in chosen.values())
    in_layers = [w for w in profile.weights if w.layer is not None]
    assert 0 < sum(cost.kl for cost in chosen.values()) <= most
    for weight in in_layers:
        below = [cost for cost in weight.costs if 0 < cost.kl <= limit]
        expected = max(below, key=lambda cost: cost.kl, default=None)
        assert chosen.get(weight.name) == expected
    assert small_changes(profile, 0.0) == {}


def test_changes_add_up_in_quadrature_by_the_layers_behind_them(source):
    profile = replace(made_up(source.inventory), expert_shift_factor=0.5)
    by_layer = {w.layer: w.name for w in profile.weights if w.role == "o"}
    first, last = by_layer[0], by_layer[max(by_layer)]
    layers = len(by_layer)
    one = profile.expert_shift({first: 0.04})
    assert one == pytest.approx(0.5 * (0.04 * (layers - 1) / layers) ** 0.5)
    assert profile.expert_shift({first: 0.04, last: 9.0}) == one
    ends = {w.role: w.name for w in profile.weights if w.layer is None}
    assert profile.expert_shift({ends["lm_head"]: 1.0}) == 0
    both = profile.expert_shift({first: 0.04, ends["embedding"]: 0.01})
    assert both == pytest.approx((one**2 + 0.5**2 * 0.01) ** 0.5)
    native, *_, smallest = next(w for w in profile.weights if w.name == first).costs
    assert predictions(profile)[first, native.tier] == 0
    expected = smallest.kl + profile.expert_shift({first: smallest.kl})
    assert predictions(profile)[first, smallest.tier] == expected > smallest.kl
    tied = replace(profile, weights=tuple(w for w in profile.weights if w.role != "lm_head"))
    assert tied.expert_shift({ends["embedding"]: 1.0}) == 0  # most of it is the head's


def test_a_plan_is_predicted_with_it_and_proven_without(source):
    profile = replace(made_up(source.inventory), expert_shift_factor=0.5)
    budget = Budget(source.inventory.total_bytes * 3 // 4)
    plan = plan_by_budget(source.inventory, profile, budget, Constraints())
    costs = {a.name: a.kl for a in plan.assignments}
    assert plan.sum_of_costs == pytest.approx(sum(costs.values()))
    assert plan.predicted_kl == plan.sum_of_costs + profile.expert_shift(costs)
    assert plan.optimality.bound == pytest.approx(plan.sum_of_costs)
    without = with_predictions(plan, replace(profile, expert_shift_factor=None))
    assert 0 < without.predicted_kl == plan.sum_of_costs < plan.predicted_kl
    saved = json.loads(json.dumps(plan.to_json()))
    assert read_plan(saved, source.inventory, "plan").predicted_kl == plan.predicted_kl
    assert unedited_plan(saved, "plan").expert_shift == plan.expert_shift
    saved["weights"][-1]["tier"] = "native"
    assert read_plan(saved, source.inventory, "plan").expert_shift == 0
    few = replace(profile, weights=tuple(replace(w, costs=w.costs[:1]) for w in profile.weights))
    unpredicted = with_predictions(plan, few)
    assert (unpredicted.predicted_kl, unpredicted.expert_shift) == (None, 0)


@pytest.mark.parametrize("factor", [-1, "0.1", True, float("inf"), float("nan")])
def test_an_impossible_factor_is_refused(source, factor):
    data = made_up(source.inventory).to_json() | {"expert_shift_factor": factor}
    with pytest.raises(ProfileError, match="not a complete profile"):
        SensitivityProfile.from_json(data, "p")
