"""Splits of a text by document: some calibrate, some validate choices, some evaluate the result.

A document belongs to one split, by a hash of its content, before any sequence is cut. Near-copies,
which share a passage of 16 tokens, count as one document. Passages that many documents share, such
as the frame of a prompt or the header of a licence, make no copies.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from quantkit.errors import CalibrationError
from quantkit.units import plural

CALIBRATE, VALIDATE, EVALUATE = SPLITS = ("calibrate", "validate", "evaluate")
_EVALUATED, _VALIDATED = 0.15, 0.1  # shares of the documents
_FIRST = 1000  # documents to read before any is assigned
_FIRST_TOKENS = 2_000_000
_COMMON = 0.1  # share of the first documents that makes a passage common,
_FEWEST = 20  # and the fewest documents that do


@dataclass(frozen=True)
class Document:
    """A document: its token ids as a model reads them, and its identity.

    `passages` are sorted hashes (uint64) of all runs of 16 tokens of its content, `place` a hash of
    its content between 0 and 1.
    """

    tokens: list[int]
    passages: np.ndarray
    place: float


Assigned = tuple[str, int, Document]
"""A split, the number of a document with its near-copies, and the document or the copy."""


def assign(documents: Iterator[Document], name: str) -> Iterator[Assigned]:
    """Yield the split and number of every document, in the order of `documents`.

    The assignment depends on earlier documents and at most a thousand later ones, so that streams
    are read no further than needed. A later document that resembles documents of several splits is
    left out. Raises CalibrationError if fewer than three documents differ.
    """
    first = _first(documents)
    if not first:
        return
    common = _common([document.passages for document in first])
    rare = [_rare(document.passages, common) for document in first]
    groups = _groups(rare)
    splits = _splits(groups, [document.place for document in first], name)
    yield from ((splits[g], g, document) for g, document in zip(groups, first, strict=True))
    group_of = {
        passage: group
        for group, passages in zip(groups, rare, strict=True)
        for passage in passages.tolist()
    }
    for document in documents:
        passages = _rare(document.passages, common).tolist()
        like = {group_of[passage] for passage in passages if passage in group_of}
        if len({splits[group] for group in like}) > 1:
            continue
        group = min(like, default=len(splits))
        if group == len(splits):
            splits.append(_split(document.place))
        group_of |= dict.fromkeys(passages, group)
        yield splits[group], group, document


def _first(documents: Iterator[Document]) -> list[Document]:
    first: list[Document] = []
    tokens = 0
    for document in islice(documents, _FIRST):
        first.append(document)
        tokens += len(document.tokens)
        if tokens > _FIRST_TOKENS:
            break
    return first


def _common(passages: list[np.ndarray]) -> np.ndarray:
    """Return the passages that many documents share."""
    if not passages:
        return np.zeros(0, np.uint64)
    values, counts = np.unique(np.concatenate(passages), return_counts=True)
    return values[counts >= max(_FEWEST, _COMMON * len(passages))]


def _rare(passages: np.ndarray, common: np.ndarray) -> np.ndarray:
    """Return the passages without common ones, unless those are most of the document."""
    rare = np.setdiff1d(passages, common, assume_unique=True)
    return rare if 2 * len(rare) >= len(passages) else passages


def _groups(passages: list[np.ndarray]) -> list[int]:
    """Number the documents so that those with a passage in common have the same number."""
    parents = list(range(len(passages)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    owner: dict[int, int] = {}
    for i, some in enumerate(passages):
        for passage in some.tolist():
            a, b = root(owner.setdefault(passage, i)), root(i)
            parents[max(a, b)] = min(a, b)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(i), len(numbers)) for i in range(len(passages))]


def _splits(groups: list[int], places: list[float], name: str) -> list[str]:
    """Return the split of every group, each of them with one group at least."""
    least: dict[int, float] = {}
    for group, place in zip(groups, places, strict=True):
        least[group] = min(place, least.get(group, 1.0))
    if len(least) < len(SPLITS):
        count = plural(len(least), "different document")
        raise CalibrationError(
            f"{name}: has {count}, too few for text to calibrate, to validate and to evaluate on. "
            "Give at least 3 documents, such as lines of a .jsonl file."
        )
    order = sorted(least, key=lambda group: least[group])
    by_place = [_split(least[group]) for group in order]
    evaluated = min(max(1, by_place.count(EVALUATE)), len(order) - 2)
    validated = min(max(1, by_place.count(VALIDATE)), len(order) - 1 - evaluated)
    splits = [CALIBRATE] * len(order)
    for rank, group in enumerate(order[: evaluated + validated]):
        splits[group] = EVALUATE if rank < evaluated else VALIDATE
    return splits


def _split(place: float) -> str:
    if place < _EVALUATED:
        return EVALUATE
    return VALIDATE if place < _EVALUATED + _VALIDATED else CALIBRATE
