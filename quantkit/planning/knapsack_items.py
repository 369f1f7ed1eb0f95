"""The options of the knapsack: dominated ones dropped, items of one shape merged."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_MOST_WORK = 3e8  # operations, to merge items of one shape


@dataclass(frozen=True)
class Option:
    """One option of an item: its costs, whole numbers for every limit, and its KL."""

    costs: tuple[int, ...]
    kl: float


def undominated(options: Sequence[Option]) -> list[int]:
    """Return the options that no other dominates with lower or equal costs and KL.

    Among equal options the first remains.
    """
    order = sorted(range(len(options)), key=lambda i: (options[i].costs, options[i].kl, i))
    undominated_numbers: list[int] = []
    for i in order:
        costs, kl = options[i].costs, options[i].kl
        if not any(
            options[j].kl <= kl
            and all(a <= b for a, b in zip(options[j].costs, costs, strict=True))
            for j in undominated_numbers
        ):
            undominated_numbers.append(i)
    return sorted(undominated_numbers)


def alike(items: Sequence[Sequence[Option]]) -> list[list[int]]:
    """Group items that have the very same costs, all on one line: items of one shape.

    Items of groups too large to merge stay single.
    """
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(tuple(sorted({option.costs for option in item})), []).append(i)
    numbers = []
    for costs, members in groups.items():
        levels = _levels(costs)
        work = 0 if levels is None else len(members) ** 2 * max(levels) * len(levels)
        if levels is None or work > _MOST_WORK:
            numbers += [[i] for i in members]
        else:
            numbers.append(members)
    return numbers


def _levels(costs: Sequence[tuple[int, ...]]) -> list[int] | None:
    """Return costs, lowest first, in steps of their common divisor; None if they are not on a
    line.
    """
    first, *others = costs
    moves = [[a - b for a, b in zip(cost, first, strict=True)] for cost in others]
    steps = [math.gcd(*column) or 1 for column in zip(*moves, strict=True)] or [1] * len(first)
    levels = [
        {m // s for m, s in zip(move, steps, strict=True) if s and any(move)} for move in moves
    ]
    if any(len(one) != 1 for one in levels):
        return None
    return [0, *(one.pop() for one in levels)]


class Merged:
    """Items of the same costs as one: the least total KL at every total cost.

    Dynamic programming over their number of steps (Dudzinski and Walukiewicz 1987).
    """

    def __init__(self, items: Sequence[Sequence[Option]], members: Sequence[int]) -> None:
        self._members = list(members)
        if len(members) == 1:
            self.options = list(items[members[0]])
            self.undominated_numbers = undominated(self.options)
            return
        costs = sorted({option.costs for option in items[members[0]]})
        levels = _levels(costs)
        assert levels is not None
        best = self._add_up(items, dict(zip(costs, levels, strict=True)))
        least = np.minimum.accumulate(np.concatenate([[np.inf], best[:-1]]))
        self._totals = np.flatnonzero(best < least).tolist()
        top = levels[-1]
        base, step = (
            costs[0],
            [(b - a) // top if top else 0 for a, b in zip(costs[0], costs[-1], strict=True)],
        )
        self.options = [
            Option(
                tuple(len(members) * b + total * s for b, s in zip(base, step, strict=True)),
                float(best[total]),
            )
            for total in self._totals
        ]
        self.undominated_numbers = list(range(len(self.options)))

    def _add_up(
        self, items: Sequence[Sequence[Option]], level_of: dict[tuple[int, ...], int]
    ) -> np.ndarray:
        """Return the least total KL at every total level, and remember the choices."""
        best = np.zeros(1)
        self._chosen: list[np.ndarray] = []
        self._level_of: list[list[int]] = []
        for i in self._members:
            grown = np.full(len(best) + max(level_of.values()), np.inf)
            chosen = np.zeros(len(grown), np.int32)
            levels = [level_of[option.costs] for option in items[i]]
            for number, (option, level) in enumerate(zip(items[i], levels, strict=True)):
                window = slice(level, level + len(best))
                better = best + option.kl < grown[window]
                grown[window] = np.where(better, best + option.kl, grown[window])
                chosen[window] = np.where(better, number, chosen[window])
            self._chosen.append(chosen)
            self._level_of.append(levels)
            best = grown
        return best

    def numbers(self, number: int) -> list[tuple[int, int]]:
        """Return (item, its option number) for one of `options`."""
        if len(self._members) == 1:
            return [(self._members[0], number)]
        total, numbers = self._totals[number], []
        for place in reversed(range(len(self._members))):
            chosen_number = int(self._chosen[place][total])
            numbers.append((self._members[place], chosen_number))
            total -= self._level_of[place][chosen_number]
        return numbers
