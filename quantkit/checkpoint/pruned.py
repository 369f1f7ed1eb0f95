"""A source without some of its experts: views of the tensors of the others, and their config.

All later stages work on it as on any source. Its inventory keeps the identity of the whole one.
"""

from dataclasses import dataclass, replace

import numpy as np

from quantkit.artifacts.experts import KeptExperts, expert_blocks, pruned_inventory
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.model_config import text_scope, with_experts
from quantkit.checkpoint.source import Source
from quantkit.checkpoint.views import View
from quantkit.errors import SourceError

_GROUP_KEYS = ("n_group", "num_expert_group")


@dataclass(frozen=True)
class _ExpertsView:
    """The values of some `experts` of a tensor that holds as many for each of `total`."""

    stored: View
    experts: tuple[int, ...]
    total: int

    @property
    def dtype(self) -> str:
        return self.stored.dtype

    @property
    def step(self) -> int:
        return self.stored.step


class ExpertRowsView(_ExpertsView):
    """The rows of some experts."""

    @property
    def rows(self) -> int:
        return self._rows_each * len(self.experts)

    @property
    def width(self) -> int:
        return self.stored.width

    @property
    def _rows_each(self) -> int:
        return self.stored.rows // self.total

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> np.ndarray:
        """Read rows [start, stop) as an array (stop - start, width)."""
        each, pieces = self._rows_each, []
        while start < stop:
            place, row = divmod(start, each)
            end = min(stop, (place + 1) * each)
            first = self.experts[place] * each + row
            pieces.append(self.stored.read(checkpoint, first, first + end - start))
            start = end
        return np.concatenate(pieces)


class ExpertColumnsView(_ExpertsView):
    """The values of some experts in a vector with one value for each."""

    @property
    def rows(self) -> int:
        return self.stored.rows

    @property
    def width(self) -> int:
        return len(self.experts)

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> np.ndarray:
        """Read rows [start, stop) as an array (stop - start, width)."""
        values = self.stored.read(checkpoint, start, stop)
        return np.ascontiguousarray(values[:, list(self.experts)])


def pruned_source(source: Source, kept: KeptExperts) -> Source:
    """Return the source with only the experts `kept`, in its config, too.

    Raises SourceError for a router that chooses among groups of experts.
    """
    require_prunable(source)
    total = source.inventory.experts or 0
    views = dict(source.views)
    packed = {w.name for w in source.inventory.weights}
    for block, names in expert_blocks(source.inventory).items():
        for name in names:
            owner, _, last = name.rpartition(".")
            suffixes = ("weight", "scales", "biases") if owner in packed else (last,)
            for tensor in {name, *(f"{owner}.{s}" for s in suffixes if last == "weight")}:
                if tensor in views:
                    views[tensor] = _cut(views[tensor], kept[block], total)
    count = len(next(iter(kept.values())))
    config = with_experts(source.checkpoint.stated_config, count)
    return replace(
        source,
        checkpoint=replace(source.checkpoint, stated_config=config),
        inventory=pruned_inventory(source.inventory, kept),
        views=views,
        whole=source,
    )


def require_prunable(source: Source) -> None:
    """Check that the experts of a model can be removed. Raises InputError or SourceError."""
    expert_blocks(source.inventory)
    scope = text_scope(source.checkpoint.config)
    if any(scope.get(key) not in (None, 0, 1) for key in _GROUP_KEYS):
        raise SourceError(
            f"{source.inventory.source.name}: its router chooses among groups of experts, which "
            "all need the same size. Leave out `experts`."
        )


def _cut(view: View, experts: tuple[int, ...], total: int) -> View:
    by_columns = view.rows % total  # a vector is a single row
    return (ExpertColumnsView if by_columns else ExpertRowsView)(view, experts, total)
