"""Rank the experts of a layer in the pass that probes its weights."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from quantkit.artifacts.experts import expert_blocks
from quantkit.artifacts.inventory import Inventory
from quantkit.backend import mx
from quantkit.errors import SourceError
from quantkit.sensitivity.expert_ranking import (
    Projections,
    Saliency,
    cross_fitted,
    fisher_saliency,
    rank_experts,
)
from quantkit.sensitivity.second_order import predicted_kl
from quantkit.streaming.layer_trace import HookedLayer, LayerTrace
from quantkit.streaming.routing import block_in_layer

_TOLERANCE = 0.1  # of the effect of removing experts, that may be due to something else
_ROUNDING = 1e-4  # of the layer's output, in float32


@dataclass(frozen=True)
class RankedBlock:
    """The ranking (experts,) of a block's experts, best first, and the KL costs (sequences,) of
    keeping so many of them."""

    block: str
    ranking: np.ndarray
    kl: Mapping[int, np.ndarray]


@dataclass(frozen=True)
class ExpertProbe:
    """Ranks the experts of each block, of which a token uses `active`.

    `blocks` maps the path of a block to the names of its tensors with a row or matrix per expert;
    `counts` are the numbers of experts to keep, largest first, `saliency` gives the worth of each.
    """

    blocks: Mapping[str, frozenset[str]]
    active: int
    counts: tuple[int, ...]
    saliency: Saliency = fisher_saliency

    @classmethod
    def of(cls, inventory: Inventory, counts: tuple[int, ...]) -> "ExpertProbe":
        """Return the probe for all blocks of a checkpoint. Raises InputError for a dense model."""
        blocks = expert_blocks(inventory)
        if inventory.experts_per_token is None:
            raise SourceError(
                "config.json does not say how many experts a token uses. Leave out `experts`."
            )
        return cls(blocks, inventory.experts_per_token, counts)

    def run(
        self, path: str, module: HookedLayer, traces: Sequence[LayerTrace], g: mx.array
    ) -> Iterator[RankedBlock]:
        """Rank the experts of the layer at `path`, for gradients `g` (draws, batch, tokens,
        hidden) at its output.

        Raises SourceError for an architecture whose experts cannot be removed.
        """
        for name in self.blocks:
            if not name.startswith(f"{path}."):
                continue
            block = block_in_layer(module.module, path, name, self.blocks[name])
            x = mx.concatenate([_routed(trace, name) for trace in traces])
            projections = Projections(block, x, g.reshape(len(g), -1, g.shape[-1]))
            ranked = rank_experts(projections, self.counts, self.active, self.saliency)
            smallest = self.counts[-1]
            with block.without(ranked.ranking[smallest:]):
                first = traces[0].call
                y = module.run(replace(first, x=first.x[:1]))
            _require_added(name, traces[0].y[:1], y, g[:, :1], ranked.slopes[smallest])
            slopes = ranked.slopes
            if g.shape[1] > 1:
                halves = [_tokens(g.shape[1:3], first) for first in (0, 1)]
                slopes = cross_fitted(projections, halves, self.counts, self.active, self.saliency)
            kl = {n: predicted_kl(slope.reshape(g.shape[:-1])) for n, slope in slopes.items()}
            yield RankedBlock(name, np.array(ranked.ranking), kl)


def _tokens(shape: tuple[int, ...], first: int) -> np.ndarray:
    """Return the numbers (n,) of the tokens of every second sequence, from the `first` on."""
    return np.arange(shape[0] * shape[1]).reshape(shape)[first::2].reshape(-1)


def _routed(trace: LayerTrace, block: str) -> mx.array:
    """Return the inputs (tokens, hidden) of a block's experts."""
    inputs = [x for holder, x in trace.routed.items() if holder.startswith(f"{block}.")]
    if len(inputs) != 1:
        raise SourceError(f"{block}: its experts are not called as mlx-lm's others are.")
    return inputs[0].reshape(-1, inputs[0].shape[-1])


def _require_added(
    block: str, native: mx.array, y: mx.array, g: mx.array, slopes: mx.array
) -> None:
    """Check on one sequence that the layer adds the block's output to its own.

    `y` and `native` (1, length, hidden) are the layer's output with and without removed experts,
    `g` (draws, 1, length, hidden) the gradients there, `slopes` (draws, tokens) their predicted
    effect. Raises SourceError.
    """
    moved = (g * (y - native)).sum(axis=-1)[:, 0]
    off = mx.abs(moved - slopes[:, : moved.shape[1]]).mean()
    noise = _ROUNDING * mx.abs(g * native).sum(axis=-1).mean()
    if (off > _TOLERANCE * mx.abs(moved).mean() + noise).item():
        raise SourceError(
            f"{block}: this architecture does not add the output of its experts to its layer's, so "
            "quantkit cannot remove any; leave out `experts`."
        )
