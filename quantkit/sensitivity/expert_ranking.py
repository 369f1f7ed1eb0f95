"""Rank the experts of a block, and predict the KL cost of keeping only the best.

With g = d log p(y) / d h for a label y drawn from the model, a change dh of the block's output
costs about KL = 1/2 E (g . dh)^2 per token (see `probe`). If an expert is removed, its tokens go to
the next one by the router, and their routing weights change: dh is the sum of dw_e y_e over the
experts e. So all that is needed of the experts are the numbers g . y_e. An expert's saliency is the
cost of removing it, summed over its tokens.

Experts are removed in stages, and ranked again after each of them: the worth of an expert depends
on which others are left to take its tokens. All costs are against the native output, so that a
removal that undoes the harm of an earlier one pays.

The experts that seem worth least on some text are worth more on other text. So the cost of keeping
the best is predicted on text that did not rank them: each half of it by the ranking of the other.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field

import numpy as np

from quantkit.backend import mx
from quantkit.streaming.routing import RoutedBlock


@dataclass(frozen=True)
class RankedExperts:
    """The experts of a block, best first, and the effects of keeping only some.

    `slopes` maps a number of experts to g . dh (draws, tokens) of keeping so many, the first ones.
    """

    ranking: tuple[int, ...]
    slopes: dict[int, mx.array]


@dataclass
class Projections:
    """The numbers g . y_e (draws, tokens, experts), computed where they are needed.

    `x` (tokens, hidden) are the inputs of the `block`, `g` (draws, tokens, hidden) the gradients at
    its output. `native` (tokens, experts) are the routing weights of all experts.
    """

    block: RoutedBlock
    x: mx.array
    g: mx.array
    values: mx.array = field(init=False)
    native: mx.array = field(init=False)

    def __post_init__(self) -> None:
        shape = (len(self.x), self.block.experts)
        self.values = mx.zeros((len(self.g), *shape))
        self._known = np.zeros(shape, bool)
        self.native = self.block.weights(self.x, self.block.mask([]))
        self.need(self.native)

    def of(self, tokens: np.ndarray) -> "Projections":
        """Return the same for some `tokens` (n,), with copies of the numbers."""
        some = copy(self)
        rows = mx.array(tokens)
        some.x, some.g, some.native = self.x[rows], self.g[:, rows], self.native[rows]
        some.values, some._known = self.values[:, rows], self._known[tokens]
        return some

    def need(self, weights: mx.array) -> None:
        """Compute what is missing for routing `weights` (tokens, experts)."""
        missing = (np.array(weights) != 0) & ~self._known
        tokens, experts = (mx.array(places.astype(np.int32)) for places in np.nonzero(missing))
        if tokens.size == 0:
            return
        self._known |= missing
        for rows, y in self.block.outputs(self.x[tokens], experts):
            at = tokens[rows], experts[rows]
            self.values[:, at[0], at[1]] = (self.g[:, at[0]] * y).sum(axis=-1)
            mx.eval(self.values)

    def slopes(self, weights: mx.array) -> mx.array:
        """Return g . dh (draws, tokens) of other routing `weights` (tokens, experts)."""
        self.need(weights)
        return ((weights - self.native) * self.values).sum(axis=-1)

    def costs(self, weights: mx.array) -> mx.array:
        """Return 1/2 (g . dh)^2 (tokens,), averaged over the draws, of other routing weights."""
        return 0.5 * mx.square(self.slopes(weights)).mean(axis=0)


Saliency = Callable[[Projections, mx.array, int], np.ndarray]
"""(projections, mask (experts,), experts per token) -> the worth (experts,) of each expert."""


def fisher_saliency(projections: Projections, mask: mx.array, active: int) -> np.ndarray:
    """Return the cost (experts,) of removing each expert, the ones of `mask` being removed.

    Costs are sums over tokens, less the cost of the removal so far. A token uses `active`
    experts; the next one by its router takes the place of the removed one.
    """
    block, x = projections.block, projections.x
    weights = block.weights(x, mask)
    before = projections.costs(weights)
    used = mx.argsort(-weights, axis=-1)[:, :active]
    saliency = mx.zeros(block.experts)
    for place in range(active):
        expert = used[:, place]
        without = mx.where(expert[:, None] == mx.arange(block.experts), -mx.inf, mask)
        cost = projections.costs(block.weights(x, without)) - before
        saliency = saliency.at[expert].add(cost)
    return np.array(saliency)


def rank_experts(
    projections: Projections,
    counts: Sequence[int],
    active: int,
    saliency: Saliency = fisher_saliency,
) -> RankedExperts:
    """Rank the experts of a block, of which a token uses `active`, by their `saliency`.

    `counts` are numbers of experts to keep, largest first, at least `active`. Equally good experts
    are removed from the last one on.
    """
    block = projections.block
    left, removed = list(range(block.experts)), list[int]()
    mask, slopes = block.mask(removed), {}
    for count in counts:
        worth = saliency(projections, mask, active)
        left.sort(key=lambda expert: (-worth[expert], expert))
        removed = left[count:] + removed
        left = left[:count]
        mask = block.mask(removed)
        slopes[count] = projections.slopes(block.weights(projections.x, mask))
        mx.eval(slopes[count])
    return RankedExperts((*left, *removed), slopes)


def cross_fitted(
    projections: Projections,
    halves: Sequence[np.ndarray],
    counts: Sequence[int],
    active: int,
    saliency: Saliency = fisher_saliency,
) -> dict[int, mx.array]:
    """Return g . dh (draws, tokens) of keeping so many experts, on tokens that did not rank them.

    `halves` are the numbers (n,) of the tokens of two parts, which rank each other's experts.
    """
    slopes = {count: mx.zeros(projections.g.shape[:2]) for count in counts}
    both = [projections.of(tokens) for tokens in halves]
    for tokens, half, other in zip(halves, both, reversed(both), strict=True):
        order = rank_experts(other, counts, active, saliency).ranking
        for count in counts:
            mask = half.block.mask(order[count:])
            slopes[count][:, mx.array(tokens)] = half.slopes(half.block.weights(half.x, mask))
            mx.eval(slopes[count])
    return slopes
