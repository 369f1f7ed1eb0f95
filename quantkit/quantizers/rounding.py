"""One weight rounded under its Hessians."""

from quantkit.artifacts.inventory import Weight
from quantkit.backend import mx
from quantkit.errors import InputError
from quantkit.formats.affine import Feedback, Rounded, feedback, gptq, objective, refit, search
from quantkit.formats.codec import FLOAT_TYPES
from quantkit.formats.tiers import QUANTIZERS, Tier
from quantkit.quantizers.hessians import Inputs, stacked

_AT_ONCE = 32_000_000  # values rounded in one go


def require_method(method: str) -> None:
    """Raises InputError for a rounding that there is not."""
    if method not in QUANTIZERS:
        raise InputError(f"there is no rounding {method!r}. Roundings: {', '.join(QUANTIZERS)}.")


class Hessians:
    """The Hessians (matrices, in, in) of weights with the same inputs, factored once for all."""

    def __init__(self, hessian: mx.array) -> None:
        self.hessian = hessian
        self.importance = mx.diagonal(hessian, axis1=-2, axis2=-1)
        self._ways: dict[int, list[Feedback]] = {}

    def ways(self, group_size: int) -> list[Feedback]:
        """To take the groups as they are stored, and by the size of their inputs."""
        if group_size not in self._ways:
            ways = [feedback(self.hessian, group_size, by_size=by) for by in (False, True)]
            self._ways[group_size] = ways[: len({way.order for way in ways})]
        return self._ways[group_size]


def rounded_under(
    weight: mx.array, hessians: Hessians, tier: Tier, method: str, dtype: mx.Dtype
) -> Rounded:
    """`weight` (matrices, out, in) in float32, in an affine `tier`, by `method`: search or gptq.

    gptq tries every way to take the groups, each with the refit behind it, and keeps for every
    matrix what is best.
    """
    hessian, importance = hessians.hessian, hessians.importance
    ways = hessians.ways(tier.group_size) if method == "gptq" else []

    def rows(part: mx.array) -> Rounded:
        if method == "search":
            return search(part, importance, tier, dtype)
        tries = [refit(part, hessian, gptq(part, way, tier, dtype), tier) for way in ways]
        best = tries[0]
        for other in tries[1:]:
            before, after = (objective(part, x.values(tier), hessian) for x in (best, other))
            best = _chosen((after < before)[..., None, None], other, best)
        return best

    step = max(1, _AT_ONCE // (weight.shape[0] * weight.shape[-1]))
    parts = []
    for start in range(0, weight.shape[-2], step):
        parts.append(rows(weight[..., start : start + step, :]))
        mx.eval(parts[-1].q, parts[-1].scales, parts[-1].biases)
    return parts[0] if len(parts) == 1 else _joined(parts, axis=-2)


def _chosen(which: mx.array, a: Rounded, b: Rounded) -> Rounded:
    pairs = ((a.q, b.q), (a.scales, b.scales), (a.biases, b.biases))
    return Rounded(*(mx.where(which, x, y) for x, y in pairs))


def _joined(parts: list[Rounded], axis: int) -> Rounded:
    columns = ([p.q for p in parts], [p.scales for p in parts], [p.biases for p in parts])
    return Rounded(*(mx.concatenate(column, axis=axis) for column in columns))


def rounded_whole(
    weight: Weight, values: mx.array, inputs: Inputs, tier: Tier, method: str
) -> Rounded:
    """All of a weight's `values` (..., out, in) at once, in an affine `tier`, by its `inputs`."""
    stack = stacked(values)
    parts = []
    for some, hessian in inputs.hessians(len(stack)):
        chunk = stack[some].astype(mx.float32)
        parts.append(rounded_under(chunk, Hessians(hessian), tier, method, stored_float(weight)))
    whole = _joined(parts, axis=0)
    shaped = (x.reshape(*values.shape[:-1], -1) for x in (whole.q, whole.scales, whole.biases))
    return Rounded(*shaped)


def stored_float(weight: Weight) -> mx.Dtype:
    """The type in which a weight's scales and biases are stored."""
    return FLOAT_TYPES[weight.dtype]
