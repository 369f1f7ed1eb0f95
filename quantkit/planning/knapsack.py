"""The multiple-choice knapsack: one option for every item, least total KL, costs within limits.

It knows no models: options in; choice, bound and gap out. HiGHS (through scipy's `milp`) solves it
to proven optimality. Three reductions, none of which loses an optimum, make it small: options that
another one dominates are dropped; items of one shape are merged; and options that by the Lagrangian
relaxation belong to no solution better than the incumbent are dropped (reduced-cost fixing; Fisher
1981, "The Lagrangian Relaxation Method for Solving Integer Programming Problems").
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from quantkit.planning.knapsack_items import Merged, Option, alike

_INFEASIBLE = 2  # of scipy's milp
_LARGE = 2  # items to branch on
_MOST_BRANCHES = 4000
_SLACK = 1e-9  # of a total: the rounding error of a sum


@dataclass(frozen=True)
class Solution:
    """The chosen option of every item.

    No choice within the limits has a KL below `bound`. `prices` are the shadow prices: the KL
    decrease per unit of each limit, at the optimum of the relaxed problem.
    """

    chosen: tuple[int, ...]
    kl: float
    bound: float
    prices: tuple[float, ...]

    @property
    def gap(self) -> float:
        """The relative distance of the solution to the bound."""
        return max(0.0, self.kl - self.bound) / self.kl if self.kl > 0 else 0.0


class ImpossibleError(Exception):
    """No choice is within the limits; `least` is the smallest possible value of each limit."""

    def __init__(self, least: tuple[int, ...]) -> None:
        super().__init__(f"at least {least} is needed")
        self.least = least


class UnsolvedError(Exception):
    """The solver ran out of time without a choice, and without proof that no choice exists."""


def solve(
    items: Sequence[Sequence[Option]], limits: Sequence[int], seconds: float = 20
) -> Solution:
    """Return the choice of least KL whose costs are within `limits`.

    Proven optimal, unless HiGHS is stopped after `seconds`: then `gap` bounds the error. Ties are
    broken deterministically. Raises ImpossibleError or UnsolvedError.
    """
    least = tuple(sum(min(o.costs[k] for o in item) for item in items) for k in range(len(limits)))
    if any(need > limit for need, limit in zip(least, limits, strict=True)):
        raise ImpossibleError(least)
    # A limit between two multiples of the common step of all costs can be rounded down.
    steps = _steps(items, len(limits))
    limits = [n + (limit - n) // s * s for n, limit, s in zip(least, limits, steps, strict=True)]
    merged = [Merged(items, members) for members in alike(items)]
    entries = [(i, n) for i, one in enumerate(merged) for n in one.undominated_numbers]
    problem = _Problem([one.options for one in merged], limits, steps, entries)
    prices, bound = problem.relaxed()
    incumbent = problem.repaired(prices)
    if incumbent is not None and problem.kl(incumbent) <= bound * (1 + _SLACK):
        best = problem.numbers(incumbent)
    else:
        search = _Search(problem, incumbent, seconds)
        search.run(problem.branches(prices, bound), (prices, bound))
        if search.best is None:
            if search.exhausted:
                raise ImpossibleError(least)
            raise UnsolvedError(f"no plan was found in {seconds:.0f} s")
        best, bound = search.best, max(bound, search.bound)
    numbers = [0] * len(items)
    for one, number in zip(merged, best, strict=True):
        for i, chosen_number in one.numbers(number):
            numbers[i] = chosen_number
    numbers = _in_order(items, numbers)
    kl = sum(item[n].kl for item, n in zip(items, numbers, strict=True))
    per_unit = tuple(float(p) / max(1, b) for p, b in zip(prices, limits, strict=True))
    return Solution(tuple(numbers), kl, min(bound, kl), per_unit)


def _steps(items: Sequence[Sequence[Option]], limits: int) -> list[int]:
    """Return, for every limit, the greatest common divisor of all cost differences of an item."""
    return [
        math.gcd(*(o.costs[k] - item[0].costs[k] for item in items for o in item)) or 1
        for k in range(limits)
    ]


class _Search:
    """Branch and bound over the choices of the few items that are much larger than the others.

    With these decided, the relaxation leaves almost nothing open. `best` is the best solution (an
    option number per item) and `kl` its KL; no choice is below `bound`; `exhausted` is False if a
    branch was given up for lack of time.
    """

    def __init__(self, problem: "_Problem", incumbent: np.ndarray | None, seconds: float) -> None:
        self._problem = problem
        self._deadline = time.monotonic() + seconds
        self.best = None if incumbent is None else problem.numbers(incumbent)
        self.kl = np.inf if incumbent is None else problem.kl(incumbent)
        self.bound = np.inf
        self.exhausted = True

    def run(
        self,
        branches: Sequence[tuple[float, Mapping[int, int]]],
        start: tuple[np.ndarray, float],
    ) -> None:
        """Search `branches`: (bound, option numbers of the decided items), lowest bound first.

        `start` is the relaxation of the whole problem.
        """
        for low, decided in branches:
            if low > self.kl * (1 + _SLACK):
                break  # so are all later ones
            branch = self._problem.with_decided(decided)
            if not branch.is_possible():
                continue
            prices, bound = start if branch is self._problem else branch.relaxed()
            incumbent = branch.repaired(prices)
            self._take(branch, incumbent)
            if bound > self.kl * (1 + _SLACK):
                continue
            left = max(0.1, self._deadline - time.monotonic())
            chosen, proven, finished = branch.exact(prices, self.kl, incumbent, left)
            self._take(branch, chosen)
            self.exhausted = self.exhausted and finished
            if not finished:
                self.bound = min(self.bound, max(low, proven))
        self.bound = min(self.bound, self.kl)

    def _take(self, branch: "_Problem", chosen: np.ndarray | None) -> None:
        if chosen is not None and branch.kl(chosen) < self.kl:
            self.best, self.kl = branch.numbers(chosen), branch.kl(chosen)


class _Problem:
    """The undominated options of all items, in one row of arrays.

    `item` and `number` identify the option; `costs` (limits, options) are in units of `limits`, so
    that 1 is the whole limit.
    """

    def __init__(
        self,
        items: Sequence[Sequence[Option]],
        limits: Sequence[int],
        steps: Sequence[int],
        entries: Sequence[tuple[int, int]],
    ) -> None:
        """Take `entries` (item, option number) in order; costs of an item differ by multiples of
        `steps`.
        """
        self.items = items
        self.limits = tuple(limits)
        self.item = np.array([i for i, _ in entries])
        self.number = np.array([n for _, n in entries])
        self.kls = np.array([items[i][n].kl for i, n in entries])
        self.whole = np.array(
            [items[i][n].costs for i, n in entries], object
        ).T  # exact, of any size
        scale = np.array([max(1, limit) for limit in limits], float)
        self.costs = self.whole.astype(float) / scale[:, None]
        # In these units a quarter of the least difference is the solver's tolerance of 1e-6.
        self.steps = tuple(steps)
        self.sharp = np.array([max(1, b / s * 4e-6) for b, s in zip(limits, steps, strict=True)])
        self.starts = np.searchsorted(self.item, np.arange(len(items)))

    def with_decided(self, decided: Mapping[int, int]) -> "_Problem":
        """Return the problem with the options of some items decided."""
        pairs = zip(self.item.tolist(), self.number.tolist(), strict=True)
        entries = [(i, n) for i, n in pairs if decided.get(i, n) == n]
        return _Problem(self.items, self.limits, self.steps, entries) if decided else self

    def is_possible(self) -> bool:
        """Return whether each limit by itself can be met."""
        least = np.minimum.reduceat(self.whole, self.starts, axis=1).sum(axis=1)
        return all(need <= limit for need, limit in zip(least, self.limits, strict=True))

    def branches(self, prices: np.ndarray, bound: float) -> list[tuple[float, dict[int, int]]]:
        """Return (bound at these prices, option number of each large item) for all their choices.

        The lowest bound comes first. An item is large if it accounts for more than a fiftieth of
        the possible costs.
        """
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
        branches = [
            (
                bound + float(excess[list(combo)].sum()),
                dict(zip(large, self.number[list(combo)].tolist(), strict=True)),
            )
            for combo in product(*choices)
        ]
        return sorted(branches, key=lambda pair: pair[0])

    def numbers(self, chosen: np.ndarray) -> list[int]:
        """Return the option number of every item, for option indices `chosen` (items,)."""
        return [int(number) for number in self.number[chosen]]

    def relaxed(self) -> tuple[np.ndarray, float]:
        """Return (shadow prices (limits,), a bound on the KL) of the linear relaxation."""
        from scipy.optimize import linprog  # takes half a second

        spread = max(float(self.kls.sum()) / max(1, len(self.kls)), 1e-300)
        result = linprog(
            self.kls / spread,
            A_ub=self.costs,
            b_ub=np.ones(len(self.limits)),
            A_eq=self._one_each(np.arange(len(self.item))),
            b_eq=np.ones(len(self.items)),
            bounds=(0, 1),
            method="highs",
        )
        if result.status != 0:  # the limits conflict, or the solver gave up
            return np.zeros(len(self.limits)), self._bound(np.zeros(len(self.limits)))
        prices = np.maximum(0, -result.ineqlin.marginals) * spread
        return prices, self._bound(prices)

    def _reduced(self, prices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (the KL plus priced costs of every option, the least of each item)."""
        priced = self.kls + prices @ self.costs
        return priced, np.minimum.reduceat(priced, self.starts)

    def _bound(self, prices: np.ndarray) -> float:
        """Return a lower bound on the KL of all solutions (weak duality)."""
        return max(0.0, float(self._reduced(prices)[1].sum() - prices.sum()))

    def repaired(self, prices: np.ndarray) -> np.ndarray | None:
        """Return a solution (items,) near the relaxed one as option indices, or None.

        Prices (limits,) are raised until each item's cheapest option fits; the remainder is spent
        on the changes that save most.
        """
        low = high = prices
        step, least = 1e-6, max(float(self.kls.max()), 1e-300) * 1e-9
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
        """Return which limits are exceeded, in exact integer arithmetic."""
        used = self.whole[:, chosen].sum(axis=1)
        return np.array([u > limit for u, limit in zip(used, self.limits, strict=True)])

    def _filled(self, chosen: np.ndarray) -> np.ndarray:
        """Return `chosen` with single changes that save KL and still fit, greatest saving first."""
        chosen = chosen.copy()
        left = 1 - self.costs[:, chosen].sum(axis=1)
        saving = self.kls[chosen][self.item] - self.kls
        for option in np.argsort(-saving, kind="stable"):
            if saving[option] <= 0:
                break
            at = self.item[option]
            more = self.costs[:, option] - self.costs[:, chosen[at]]
            if self.kls[option] < self.kls[chosen[at]] and (more <= left).all():
                changed = chosen.copy()
                changed[at] = option
                if not self._over(changed).any():
                    chosen, left = changed, left - more
        return chosen

    def kl(self, chosen: np.ndarray) -> float:
        """Return the total KL of option indices `chosen` (items,)."""
        return float(self.kls[chosen].sum())

    def exact(
        self, prices: np.ndarray, most: float, incumbent: np.ndarray | None, seconds: float
    ) -> tuple[np.ndarray | None, float, bool]:
        """Return (the best solution with a KL up to `most`, a bound, whether it is proven).

        Uses only options that reduced-cost fixing at `prices` (limits,) leaves open. `incumbent`
        (items,) is the best solution so far.
        """
        from scipy import sparse
        from scipy.optimize import Bounds, LinearConstraint, milp

        bound = self._bound(prices)
        priced, least = self._reduced(prices)
        excess = priced - least[self.item]
        room = most * (1 + _SLACK) - bound
        open_ = np.flatnonzero(excess <= room)
        if incumbent is not None:
            open_ = np.union1d(open_, incumbent)
        if len(np.unique(self.item[open_])) < len(self.items):
            return incumbent, bound, True  # an item has no option left
        # The KL is the bound, plus the excess of every choice, plus the price of the unused limits:
        # small numbers, compared to which the solver's tolerances vanish.
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
            return incumbent, bound, result.status == _INFEASIBLE
        chosen = open_[np.round(result.x[:count]).astype(bool)]
        if self._over(chosen).any():
            return incumbent, bound, False
        if incumbent is not None and self.kl(incumbent) < self.kl(chosen):
            chosen = incumbent
        return chosen, bound + float(result.mip_dual_bound or 0) * unit, result.status == 0

    def _one_each(self, options: np.ndarray) -> Any:
        from scipy import sparse

        ones = np.ones(len(options))
        shape = (len(self.items), len(options))
        return sparse.csr_matrix((ones, (self.item[options], np.arange(len(options)))), shape)


def _in_order(items: Sequence[Sequence[Option]], numbers: Sequence[int]) -> list[int]:
    """Give items with identical options their numbers in a fixed order, independent of the
    solver.
    """
    alike: dict[tuple[Option, ...], list[int]] = {}
    for i, item in enumerate(items):
        alike.setdefault(tuple(item), []).append(i)
    ordered = list(numbers)
    for same in alike.values():
        for i, number in zip(same, sorted(ordered[i] for i in same), strict=True):
            ordered[i] = number
    return ordered
