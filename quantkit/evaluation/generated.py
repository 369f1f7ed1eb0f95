"""Items of benchmarks that are generated: the same on every machine."""

import string
from collections.abc import Callable, Mapping
from itertools import pairwise
from random import Random
from typing import Any

_CHARACTERS = 12_000  # of an item's lines
_HASH = 16  # letters
_HOPS = 4  # of the longest chain


def hash_chains(count: int) -> list[Mapping[str, Any]]:
    """Return items with shuffled `lines` of assignments, and the `answer` at the end of a chain.

    `KEY = VALUE` leads on to the line of that value, `KEY = 'VALUE'` ends a chain of 1 to 4 `hops`
    (HashHop, Magic 2024).
    """
    return [_item(Random(number), number % _HOPS + 1) for number in range(count)]


def _item(random: Random, hops: int) -> Mapping[str, Any]:
    query, answer, lines = _chain(random, hops)
    size = sum(map(len, lines))
    while size < _CHARACTERS:
        _, _, more = _chain(random, random.randint(1, _HOPS))
        lines += more
        size += sum(len(line) + 1 for line in more)
    random.shuffle(lines)
    return {"lines": "\n".join(lines), "query": query, "answer": answer, "hops": hops}


def _chain(random: Random, hops: int) -> tuple[str, str, list[str]]:
    """Return the first key of a chain, its last value, and its lines."""
    words = ["".join(random.choices(string.ascii_letters, k=_HASH)) for _ in range(hops + 1)]
    lines = [f"{a} = {b}" for a, b in pairwise(words[:-1])]
    return words[0], words[-1], [*lines, f"{words[-2]} = '{words[-1]}'"]


GENERATORS: dict[str, Callable[[int], list[Mapping[str, Any]]]] = {"hash_chains": hash_chains}
