"""What there is to choose from: options, those that none beats, and items of one shape as one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_MOST_WORK = 3e8  # of merging items of one shape


@dataclass(frozen=True)
class Option:
    """One way to choose for an item: what it takes of every limit, in whole numbers, and loses."""

    costs: tuple[int, ...]
    loss: float


def undominated(options: Sequence[Option]) -> list[int]:
    """The options that no other one beats: with no more of any cost, and no more loss. Of equals
    the first is kept."""
    order = sorted(range(len(options)), key=lambda i: (options[i].costs, options[i].loss, i))
    kept: list[int] = []
    for i in order:
        costs, loss = options[i].costs, options[i].loss
        if not any(
            options[j].loss <= loss
            and all(a <= b for a, b in zip(options[j].costs, costs, strict=True))
            for j in kept
        ):
            kept.append(i)
    return sorted(kept)


def alike(items: Sequence[Sequence[Option]]) -> list[list[int]]:
    """Items in groups that have the very same costs to choose from, all on one line: those of one
    shape. Groups too large to be merged are left as single items."""
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(tuple(sorted({option.costs for option in item})), []).append(i)
    found = []
    for costs, members in groups.items():
        levels = _levels(costs)
        work = 0 if levels is None else len(members) ** 2 * max(levels) * len(levels)
        if levels is None or work > _MOST_WORK:
            found += [[i] for i in members]
        else:
            found.append(members)
    return found


def _levels(costs: Sequence[tuple[int, ...]]) -> list[int] | None:
    """Costs, lowest first, in steps of their common divisor; None where they are not on a line."""
    first, *rest = costs
    moves = [[a - b for a, b in zip(cost, first, strict=True)] for cost in rest]
    steps = [math.gcd(*column) or 1 for column in zip(*moves, strict=True)] or [1] * len(first)
    levels = [
        {m // s for m, s in zip(move, steps, strict=True) if s and any(move)} for move in moves
    ]
    if any(len(one) != 1 for one in levels):
        return None
    return [0, *(one.pop() for one in levels)]


class Merged:
    """Items of the same costs as one: how little they can lose together at every total cost, by
    dynamic programming over their number of steps (Dudzinski and Walukiewicz 1987)."""

    def __init__(self, items: Sequence[Sequence[Option]], members: Sequence[int]) -> None:
        self._members = list(members)
        if len(members) == 1:
            self.options = list(items[members[0]])
            self.kept = undominated(self.options)
            return
        costs = sorted({option.costs for option in items[members[0]]})
        levels = _levels(costs)
        assert levels is not None
        at = dict(zip(costs, levels, strict=True))
        best = np.zeros(1)
        self._chosen: list[np.ndarray] = []
        self._level_of: list[list[int]] = []
        for i in members:
            grown = np.full(len(best) + levels[-1], np.inf)
            chosen = np.zeros(len(grown), np.int32)
            self._level_of.append([at[option.costs] for option in items[i]])
            for number, (option, level) in enumerate(
                zip(items[i], self._level_of[-1], strict=True)
            ):
                part = slice(level, level + len(best))
                better = best + option.loss < grown[part]
                grown[part] = np.where(better, best + option.loss, grown[part])
                chosen[part] = np.where(better, number, chosen[part])
            self._chosen.append(chosen)
            best = grown
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
        self.kept = list(range(len(self.options)))

    def numbers(self, number: int) -> list[tuple[int, int]]:
        """(item, its option) for one of `options`."""
        if len(self._members) == 1:
            return [(self._members[0], number)]
        total, found = self._totals[number], []
        for place in reversed(range(len(self._members))):
            own = int(self._chosen[place][total])
            found.append((self._members[place], own))
            total -= self._level_of[place][own]
        return found
