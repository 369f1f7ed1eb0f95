"""The multiple-choice knapsack: one option for every item, least total loss, costs within limits.

It knows no models: lists of options in, choices, bound and gap out. HiGHS (through scipy's `milp`)
solves it to proven optimality. Before that three things make it small and lose no optimum: options
that another one beats in every respect are dropped; items of one shape are merged; and options that
the Lagrangian relaxation proves to stand in no solution better than one that is already known are
dropped, too (reduced-cost fixing; Fisher 1981, "The Lagrangian Relaxation Method for Solving
Integer Programming Problems").
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from quantkit.planning.options import Merged, Option, alike

_INFEASIBLE = 2  # of scipy's milp
_LARGE = 2  # items to branch on
_MOST_BRANCHES = 4000
_SLACK = 1e-9  # of a total: how far two sums of the same losses may differ by rounding


@dataclass(frozen=True)
class Solution:
    """The option chosen for every item.

    No choice within the limits loses less than `bound`. `prices` are the loss that one more unit of
    every limit would save at the optimum of the relaxed problem.
    """

    chosen: tuple[int, ...]
    loss: float
    bound: float
    prices: tuple[float, ...]

    @property
    def gap(self) -> float:
        """What the solution may lose more than the best one, over its own loss."""
        return max(0.0, self.loss - self.bound) / self.loss if self.loss > 0 else 0.0


class ImpossibleError(Exception):
    """No choice is within the limits; `least` is the least that each limit would have to be."""

    def __init__(self, least: tuple[int, ...]) -> None:
        super().__init__(f"at least {least} is needed")
        self.least = least


class UnsolvedError(Exception):
    """The solver found no choice in the time it was given, nor that there is none."""


def solve(
    items: Sequence[Sequence[Option]], limits: Sequence[int], seconds: float = 20
) -> Solution:
    """The choice of least loss whose costs are within `limits`.

    Proven optimal, unless HiGHS is stopped after `seconds`: then `gap` says how far it may be off.
    Of several choices with the same loss and costs one is taken in a fixed manner. Raises
    ImpossibleError or UnsolvedError.
    """
    least = tuple(sum(min(o.costs[k] for o in item) for item in items) for k in range(len(limits)))
    if any(need > limit for need, limit in zip(least, limits, strict=True)):
        raise ImpossibleError(least)
    # No choice takes what lies between two multiples of the common step of all costs.
    steps = _steps(items, len(limits))
    limits = [n + (limit - n) // s * s for n, limit, s in zip(least, limits, steps, strict=True)]
    merged = [Merged(items, members) for members in alike(items)]
    kept = [(i, n) for i, one in enumerate(merged) for n in one.kept]
    problem = _Problem([one.options for one in merged], limits, steps, kept)
    prices, bound = problem.relaxed()
    known = problem.repaired(prices)
    if known is not None and problem.loss(known) <= bound * (1 + _SLACK):
        best = problem.numbers(known)
    else:
        search = _Search(problem, known, seconds)
        search.run(problem.branches(prices, bound), (prices, bound))
        if search.best is None:
            if search.exhausted:
                raise ImpossibleError(least)
            raise UnsolvedError(f"no plan was found in {seconds:.0f} s")
        best, bound = search.best, max(bound, search.bound)
    numbers = [0] * len(items)
    for one, number in zip(merged, best, strict=True):
        for i, own in one.numbers(number):
            numbers[i] = own
    numbers = _in_order(items, numbers)
    loss = sum(item[n].loss for item, n in zip(items, numbers, strict=True))
    per_unit = tuple(float(p) / max(1, b) for p, b in zip(prices, limits, strict=True))
    return Solution(tuple(numbers), loss, min(bound, loss), per_unit)


def _steps(items: Sequence[Sequence[Option]], limits: int) -> list[int]:
    """For every limit, the greatest number that divides all differences between an item's costs."""
    return [
        math.gcd(*(o.costs[k] - item[0].costs[k] for item in items for o in item)) or 1
        for k in range(limits)
    ]


class _Search:
    """Branch and bound over the choices of the few items that are large beside all others.

    With these decided, the relaxation of the rest is so close that almost nothing is left open.
    `best` is what was found (an option number per item) and loses `loss`; no choice loses less than
    `bound`; `exhausted` says that no branch was given up for lack of time.
    """

    def __init__(self, problem: "_Problem", known: np.ndarray | None, seconds: float) -> None:
        self._problem = problem
        self._deadline = time.monotonic() + seconds
        self.best = None if known is None else problem.numbers(known)
        self.loss = np.inf if known is None else problem.loss(known)
        self.bound = np.inf
        self.exhausted = True

    def run(
        self,
        branches: Sequence[tuple[float, Mapping[int, int]]],
        start: tuple[np.ndarray, float],
    ) -> None:
        """`branches` are (bound, option number of the items that are decided), lowest first;
        `start` is the whole problem's relaxation."""
        for low, decided in branches:
            if low > self.loss * (1 + _SLACK):
                break  # as are all that come after
            part = self._problem.with_decided(decided)
            if not part.is_possible():
                continue
            prices, bound = start if part is self._problem else part.relaxed()
            known = part.repaired(prices)
            self._take(part, known)
            if bound > self.loss * (1 + _SLACK):
                continue
            left = max(0.1, self._deadline - time.monotonic())
            chosen, proven, finished = part.exact(prices, self.loss, known, left)
            self._take(part, chosen)
            self.exhausted = self.exhausted and finished
            if not finished:
                self.bound = min(self.bound, max(low, proven))
        self.bound = min(self.bound, self.loss)

    def _take(self, part: "_Problem", chosen: np.ndarray | None) -> None:
        if chosen is not None and part.loss(chosen) < self.loss:
            self.best, self.loss = part.numbers(chosen), part.loss(chosen)


class _Problem:
    """The undominated options of all items, in one row of arrays.

    `item` and `number` say whose option each one is and which; `costs` (limits, options) are in
    units of `limits`, so that 1 is all there is.
    """

    def __init__(
        self,
        items: Sequence[Sequence[Option]],
        limits: Sequence[int],
        steps: Sequence[int],
        kept: Sequence[tuple[int, int]],
    ) -> None:
        """`kept` are the (item, option number) to choose from, in order; costs of an item differ by
        multiples of `steps`."""
        self.items = items
        self.limits = tuple(limits)
        self.item = np.array([i for i, _ in kept])
        self.number = np.array([n for _, n in kept])
        self.loss_of = np.array([items[i][n].loss for i, n in kept])
        self.whole = np.array([items[i][n].costs for i, n in kept], object).T  # exact, of any size
        scale = np.array([max(1, limit) for limit in limits], float)
        self.costs = self.whole.astype(float) / scale[:, None]
        # In these units a quarter of the least difference is the solver's tolerance of 1e-6.
        self.steps = tuple(steps)
        self.sharp = np.array([max(1, b / s * 4e-6) for b, s in zip(limits, steps, strict=True)])
        self.starts = np.searchsorted(self.item, np.arange(len(items)))

    def with_decided(self, decided: Mapping[int, int]) -> "_Problem":
        """The same with the option of some items decided."""
        pairs = zip(self.item.tolist(), self.number.tolist(), strict=True)
        kept = [(i, n) for i, n in pairs if decided.get(i, n) == n]
        return _Problem(self.items, self.limits, self.steps, kept) if decided else self

    def is_possible(self) -> bool:
        """Whether each limit by itself can be kept to."""
        least = np.minimum.reduceat(self.whole, self.starts, axis=1).sum(axis=1)
        return all(need <= limit for need, limit in zip(least, self.limits, strict=True))

    def branches(self, prices: np.ndarray, bound: float) -> list[tuple[float, dict[int, int]]]:
        """(bound at these prices, option number of each large item) for all their choices, the
        lowest first; large is what makes up more than a fiftieth of all that can be spent."""
        most, least = (
            np.array([cut(row, self.starts) for row in self.costs])
            for cut in (np.maximum.reduceat, np.minimum.reduceat)
        )
        share = (
            (most - least) / np.maximum((most - least).sum(axis=1, keepdims=True), 1e-300)
        ).max(axis=0)
        large = [i for i in np.argsort(-share, kind="stable")[:_LARGE].tolist() if share[i] > 0.02]
        priced, cheapest = self._reduced(prices)
        excess = priced - cheapest[self.item]
        choices = [np.flatnonzero(self.item == i).tolist() for i in large]
        while math.prod(map(len, choices)) > _MOST_BRANCHES:
            large.pop()
            choices.pop()
        found = [
            (
                bound + float(excess[list(combo)].sum()),
                dict(zip(large, self.number[list(combo)].tolist(), strict=True)),
            )
            for combo in product(*choices)
        ]
        return sorted(found, key=lambda pair: pair[0])

    def numbers(self, chosen: np.ndarray) -> list[int]:
        """The option number of every item."""
        return [int(number) for number in self.number[chosen]]

    def relaxed(self) -> tuple[np.ndarray, float]:
        """(price of every whole limit, a bound on the loss) from the linear relaxation."""
        from scipy.optimize import linprog  # takes half a second, which not every command has

        spread = max(float(self.loss_of.sum()) / max(1, len(self.loss_of)), 1e-300)
        result = linprog(
            self.loss_of / spread,
            A_ub=self.costs,
            b_ub=np.ones(len(self.limits)),
            A_eq=self._one_each(np.arange(len(self.item))),
            b_eq=np.ones(len(self.items)),
            bounds=(0, 1),
            method="highs",
        )
        if result.status != 0:  # the limits exclude one another, or it is too hard: no prices
            return np.zeros(len(self.limits)), self._bound(np.zeros(len(self.limits)))
        prices = np.maximum(0, -result.ineqlin.marginals) * spread
        return prices, self._bound(prices)

    def _reduced(self, prices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(what every option costs at these prices, the least of each item)"""
        priced = self.loss_of + prices @ self.costs
        return priced, np.minimum.reduceat(priced, self.starts)

    def _bound(self, prices: np.ndarray) -> float:
        """No solution loses less (weak duality)."""
        return max(0.0, float(self._reduced(prices)[1].sum() - prices.sum()))

    def repaired(self, prices: np.ndarray) -> np.ndarray | None:
        """A solution near the relaxed one: option indices, or None if none was found.

        At prices raised until all fits, each item takes its cheapest option; what is left over is
        spent on the changes that save the most.
        """
        low = high = prices
        step, least = 1e-6, max(float(self.loss_of.max()), 1e-300) * 1e-9
        while (over := self._over(self._cheapest(high))).any():
            low, high = high, np.where(over, high * (1 + step) + least, high)
            step, least = 2 * step, 2 * least
            if step > 1e12:
                return None
        for _ in range(60):
            middle = (low + high) / 2
            if self._over(self._cheapest(middle)).any():
                low = middle
            else:
                high = middle
        return self._filled(self._cheapest(high))

    def _cheapest(self, prices: np.ndarray) -> np.ndarray:
        priced, least = self._reduced(prices)
        first = np.flatnonzero(priced <= least[self.item])
        return first[np.searchsorted(self.item[first], np.arange(len(self.items)))]

    def _over(self, chosen: np.ndarray) -> np.ndarray:
        """Which limits are passed; exactly, in whole numbers."""
        used = self.whole[:, chosen].sum(axis=1)
        return np.array([u > limit for u, limit in zip(used, self.limits, strict=True)])

    def _filled(self, chosen: np.ndarray) -> np.ndarray:
        """`chosen` with single changes that save loss and still fit, the greatest saving first."""
        chosen = chosen.copy()
        left = 1 - self.costs[:, chosen].sum(axis=1)
        saving = self.loss_of[chosen][self.item] - self.loss_of
        for option in np.argsort(-saving, kind="stable"):
            if saving[option] <= 0:
                break
            at = self.item[option]
            more = self.costs[:, option] - self.costs[:, chosen[at]]
            if self.loss_of[option] < self.loss_of[chosen[at]] and (more <= left).all():
                trial = chosen.copy()
                trial[at] = option
                if not self._over(trial).any():
                    chosen, left = trial, left - more
        return chosen

    def loss(self, chosen: np.ndarray) -> float:
        return float(self.loss_of[chosen].sum())

    def exact(
        self, prices: np.ndarray, most: float, known: np.ndarray | None, seconds: float
    ) -> tuple[np.ndarray | None, float, bool]:
        """(the best solution that loses no more than `most`, a bound on all solutions, whether that
        was settled in time), from the options that can stand in one."""
        from scipy import sparse
        from scipy.optimize import Bounds, LinearConstraint, milp

        bound = self._bound(prices)
        priced, least = self._reduced(prices)
        excess = priced - least[self.item]
        room = most * (1 + _SLACK) - bound
        open_ = np.flatnonzero(excess <= room)
        if known is not None:
            open_ = np.union1d(open_, known)
        if len(np.unique(self.item[open_])) < len(self.items):
            return known, bound, True  # an item has no option that is good enough
        # In these terms the loss is the bound, plus the excess of every choice, plus the price of
        # what is left over: small numbers, next to which the solver's tolerances are nothing.
        largest = room if 0 < room < np.inf else max(float(excess.max()), float(prices.max()))
        unit = max(largest, 1e-300) / 1e4
        count, limits = len(open_), len(self.limits)
        rows = self.costs[:, open_] * self.sharp[:, None]
        within = sparse.hstack([sparse.csr_matrix(rows), sparse.eye(limits)])
        beside = sparse.csr_matrix((len(self.items), limits))
        result = milp(
            np.concatenate([excess[open_], prices / self.sharp]) / unit,
            constraints=[
                LinearConstraint(within, self.sharp, self.sharp),
                LinearConstraint(sparse.hstack([self._one_each(open_), beside]), 1, 1),
            ],
            integrality=np.concatenate([np.ones(count), np.zeros(limits)]),
            bounds=Bounds(0, np.concatenate([np.ones(count), np.full(limits, np.inf)])),
            options={"mip_rel_gap": 0, "time_limit": seconds},
        )
        if result.x is None:
            return known, bound, result.status == _INFEASIBLE
        chosen = open_[np.round(result.x[:count]).astype(bool)]
        if self._over(chosen).any():
            return known, bound, False
        if known is not None and self.loss(known) < self.loss(chosen):
            chosen = known
        return chosen, bound + float(result.mip_dual_bound or 0) * unit, result.status == 0

    def _one_each(self, options: np.ndarray) -> Any:
        from scipy import sparse

        ones = np.ones(len(options))
        shape = (len(self.items), len(options))
        return sparse.csr_matrix((ones, (self.item[options], np.arange(len(options)))), shape)


def _in_order(items: Sequence[Sequence[Option]], numbers: Sequence[int]) -> list[int]:
    """Items with the very same options may trade what they were given: the first of them takes the
    option that comes first, so that which one does not depend on the solver."""
    alike: dict[tuple[Option, ...], list[int]] = {}
    for i, item in enumerate(items):
        alike.setdefault(tuple(item), []).append(i)
    ordered = list(numbers)
    for same in alike.values():
        for i, number in zip(same, sorted(ordered[i] for i in same), strict=True):
            ordered[i] = number
    return ordered
