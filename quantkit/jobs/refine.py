"""Refine: measure plans, and correct the predictions that chose them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from quantkit.artifacts.plan import Plan
from quantkit.artifacts.sensitivity import SensitivityProfile
from quantkit.backend import mx
from quantkit.calibration.calibration_set import CalibrationSpec, read_calibration_set
from quantkit.calibration.splits import VALIDATE
from quantkit.checkpoint.source import Source, with_values
from quantkit.formats.tiers import Tier
from quantkit.planning.allocator import corrected_by, plan_by_budget
from quantkit.planning.budget import Budget
from quantkit.planning.constraints import Constraints
from quantkit.planning.frontier import recipe_baselines
from quantkit.planning.plan import with_predictions
from quantkit.progress import Progress, Stage
from quantkit.quantizers.layerwise import changed_tiers
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.measure_kl import RemovedExperts, measure_kl

_TOKENS = 2048
Change = tuple[Mapping[str, Tier], RemovedExperts]


@dataclass(frozen=True)
class MeasuredPlan:
    """A plan with its measured KL divergence, and the corrected profile that chose it.

    `kl` is measured, `predicted` is predicted with all weights rounded to nearest. By the plan's
    own quantizer, a divergence of `expected` is left.
    """

    plan: Plan
    kl: float
    predicted: float
    profile: SensitivityProfile

    @property
    def expected(self) -> float:
        by_quantizer = self.plan.predicted_kl or 0.0
        return self.kl * by_quantizer / self.predicted if self.predicted else self.kl


def refine(
    source: Source,
    profile: SensitivityProfile,
    budget: Budget,
    constraints: Constraints,
    rounds: int = 1,
    progress: Progress | None = None,
) -> list[MeasuredPlan]:
    """Return measured plans within the budget, the best one for its quantizer first.

    KL costs are only approximately additive. So the plan is measured, whole and one role at a time;
    the predictions of each role are corrected by the measurements; and the budget is solved again,
    `rounds` times. So is the removal of experts alone. Shipped recipes of the same size are
    measured, too.

    The text is 2,048 tokens of the shipped documents to validate on, which every plan then lists
    among its calibration texts. Raises InputError.
    """
    source = with_values(source)
    text = profile.calibration
    spec = CalibrationSpec(tokens=_TOKENS, sequence_length=text.sequence_length, seed=text.seed)
    calibration = read_calibration_set(source.checkpoint, spec, VALIDATE)
    texts = tuple(dict.fromkeys((text, calibration.text)))
    model = StreamingModel(source)
    stage = (progress or Progress()).stage("Measuring plans", 0, "steps")
    corrected = profile
    pending = [
        plan_by_budget(source.inventory, profile, budget, constraints),
        *recipe_baselines(source.inventory, profile, budget, constraints),
    ]
    measured: list[MeasuredPlan] = []
    for number in range(rounds + 1):
        plan = pending[0]
        candidates: list[Change] = [(changed_tiers(source, p), _removed(p)) for p in pending]
        roles: list[str] = []
        if number < rounds:  # nothing is corrected after the last round
            roles = list(dict.fromkeys(source.weights[name].role for name in candidates[0][0]))
        candidates += [(changed_tiers(source, plan, role), {}) for role in roles]
        candidates += [({}, _removed(plan))] if roles and plan.pruning else []
        means = _means(model, calibration.tokens, candidates, stage)
        for p, kl in zip(pending, means, strict=False):
            named = replace(p, measured_kl=kl, calibration_texts=texts)
            nearest = with_predictions(replace(p, quantizer=corrected.quantizer), corrected)
            measured.append(MeasuredPlan(named, kl, nearest.predicted_kl or 0.0, corrected))
        seen = {one.plan.tiers_sha256 for one in measured}
        by_role = dict(zip(roles, means[len(pending) :], strict=False))
        removal = means[-1] if roles and plan.pruning else None
        corrected = corrected_by(corrected, plan, by_role, removal)
        pending = [plan_by_budget(source.inventory, corrected, budget, constraints)]
        if not roles or pending[0].tiers_sha256 in seen:
            break
    return sorted(measured, key=lambda one: one.expected)


def _removed(plan: Plan) -> RemovedExperts:
    """Return the experts that a plan removes."""
    pruning = plan.pruning
    return {} if pruning is None else {block: pruning.removed(block) for block in pruning.kept}


def _means(
    model: StreamingModel, tokens: np.ndarray, candidates: list[Change], stage: Stage
) -> list[float]:
    """Return the mean KL divergence of each candidate."""
    tiers = [tiers for tiers, _ in candidates]
    removed = [experts for _, experts in candidates]
    divergences = measure_kl(
        model, mx.array(tokens), tiers, lambda _: stage(1, "measuring"), removed
    )
    return [float(kl.mean(dtype=np.float64)) for kl in divergences]
