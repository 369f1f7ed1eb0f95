"""Profiles made up for the purpose."""

import numpy as np

from quantkit.artifacts.calibration import CalibrationText
from quantkit.artifacts.experts import ExpertRanking, expert_blocks
from quantkit.artifacts.sensitivity import SensitivityProfile, TierCost, WeightSensitivity
from quantkit.formats.tiers import canonical, parse_tier

TIERS = ("q8g64", "q6g64", "q4g64", "q4g32", "q3g64", "q2g64")


def made_up(inventory, tiers=TIERS, seed=0, dominated=False, counts=(), removal=0.0):
    """Losses that grow as bits get fewer, and differ between weights.

    A block that keeps one of `counts` experts loses up to `removal`.
    """
    rng = np.random.default_rng(seed)
    weights = []
    for weight in inventory.weights:
        storage = parse_tier(weight.storage)
        rows = [TierCost(canonical(storage, storage).name, weight.bytes, 0.0, 0.0)]
        scale = weight.parameters / inventory.parameters * np.exp(rng.normal())
        for tier in map(parse_tier, tiers):
            if tier.fits(weight.shape):
                size = tier.stored_bytes(weight.shape, weight.dtype)
                if size < weight.bytes or dominated:
                    rows.append(TierCost(tier.name, size, float(scale * 4.0**-(tier.bits)), 0.0))
        weights.append(
            WeightSensitivity(
                weight.name,
                weight.role,
                weight.layer,
                weight.storage,
                weight.parameters,
                0,
                tuple(rows),
            )
        )
    text = CalibrationText("default", "", 4, 256, 0, "", "")
    rankings = {}
    if counts:
        for block in expert_blocks(inventory):
            order = tuple(map(int, rng.permutation(inventory.experts)))
            kl = {k: removal * (inventory.experts - k) / inventory.experts for k in counts}
            rankings[block] = ExpertRanking(order, kl, dict.fromkeys(counts, 0.0))
    return SensitivityProfile(
        inventory.source,
        inventory.model_type,
        "fisher",
        "rtn",
        2,
        tuple(tiers),
        text,
        tuple(weights),
        expert_rankings=rankings,
    )
