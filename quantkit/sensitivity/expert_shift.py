"""Measure the factor of expert-shift, which costs from gradients lack: choices have no gradient."""

from dataclasses import replace

import numpy as np

from quantkit.artifacts.sensitivity import SensitivityProfile, TierCost
from quantkit.backend import mx
from quantkit.calibration.calibration_set import CalibrationSpec, read_calibration_set
from quantkit.calibration.fingerprint import passages
from quantkit.calibration.splits import VALIDATE
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.errors import SourceError
from quantkit.formats.tiers import parse_tier
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.measure_kl import measure_kl

_TOKENS = 1024  # in four sequences, one for each kind of the shipped text
_COST = 5e-4  # nats per token: changes this small cost about as much again by expert-shift


def expert_shift_text(checkpoint: Checkpoint, profiled: CalibrationSpec) -> np.ndarray:
    """Return the token ids (sequences, length) to measure expert-shift on: 1,024 tokens of the
    shipped documents to validate on.

    On the text of a profile, which is `profiled`, more tokens change their experts. Raises
    CalibrationError.
    """
    length = min(profiled.sequence_length, _TOKENS // 4)
    spec = CalibrationSpec(tokens=_TOKENS, sequence_length=length, seed=profiled.seed)
    return read_calibration_set(checkpoint, spec, VALIDATE).tokens


def text_to_check(
    checkpoint: Checkpoint, profiled: CalibrationSpec, shift_tokens: np.ndarray | None
) -> np.ndarray:
    """Return token ids (sequences, length) to check a profile of the text `profiled` on.

    They are others than `shift_tokens` (sequences, length), on which its expert-shift was measured,
    if there is enough text. Raises CalibrationError.
    """
    if shift_tokens is None:
        return read_calibration_set(checkpoint, profiled, VALIDATE).tokens
    more = replace(profiled, tokens=profiled.tokens + _TOKENS)
    tokens = read_calibration_set(checkpoint, more, VALIDATE).tokens
    read = passages(shift_tokens)
    # Half of the passages, as in `overlaps`: chats share the opening of their template.
    unread = [s for s in tokens if np.isin(passages(s[None]), read).mean() < 0.5]
    return np.stack(unread or list(tokens))[: profiled.sequences]


def with_expert_shift(
    model: StreamingModel, profile: SensitivityProfile, tokens: np.ndarray
) -> SensitivityProfile:
    """Return `profile` with the factor of expert-shift, 0 if none of its changes are small enough.

    It is measured in one run of the model with many small changes at once, on `tokens` (sequences,
    length). Raises SourceError for a divergence that is not finite.
    """
    changes = small_changes(profile, _COST)
    if not changes:
        return replace(profile, expert_shift_factor=0.0)
    tiers = {name: parse_tier(cost.tier) for name, cost in changes.items()}
    (measured,) = measure_kl(model, mx.array(tokens), [tiers], lambda _: None)
    if not np.isfinite(measured).all():
        raise SourceError("the KL divergence by expert-shift is not finite.")
    costs = {name: cost.kl for name, cost in changes.items()}
    more = max(0.0, float(measured.mean()) - sum(costs.values()))
    by_factor = replace(profile, expert_shift_factor=1.0).expert_shift(costs)
    return replace(profile, expert_shift_factor=more / by_factor if by_factor else 0.0)


def small_changes(profile: SensitivityProfile, most: float) -> dict[str, TierCost]:
    """Return the costliest tier of each weight in a layer below one limit, the highest limit whose
    tiers cost at most `most` together, in nats per token; weights without any are left out.
    """
    rows = [
        (cost.kl, w.name, cost) for w in profile.weights if w.layer is not None for cost in w.costs
    ]
    chosen: dict[str, TierCost] = {}
    total = 0.0
    for kl, name, cost in sorted((row for row in rows if row[0] > 0), key=lambda row: row[:2]):
        total += kl - (chosen[name].kl if name in chosen else 0.0)
        if total > most:
            break
        chosen[name] = cost
    return chosen
