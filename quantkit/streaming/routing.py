"""A block of experts: its routing under any mask of experts, and the outputs of single experts.

Both come from mlx-lm's own block. With experts whose outputs are unit vectors, its output is the
routing weights; with a router whose logits are lowered to minus infinity, it routes as if those
experts did not exist.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np

from quantkit.backend import mx
from quantkit.backend.memory_limits import memory_limits
from quantkit.errors import SourceError
from quantkit.streaming.layer_runner import submodule

_CORRECTION = "e_score_correction_bias"


class RoutedBlock:
    """A block of experts with its weights in memory.

    `holder` is the name of its module with the stacks, `router` the name of its router.
    """

    def __init__(self, module: Any, holder: str, router: str) -> None:
        self._module = module
        self._holder = holder
        self._router = router
        self.experts: int = self._router_module.weight.shape[0]

    @property
    def _router_module(self) -> Any:
        router = submodule(self._module, self._router)
        return getattr(router, "module", router)  # behind a hook

    def weights(self, x: mx.array, mask: mx.array) -> mx.array:
        """Return the routing weights (tokens, experts) for inputs `x` (tokens, hidden).

        `mask` (experts,) or (tokens, experts) is added to the logits of the router: minus infinity
        removes an expert. Weights of experts that a token does not use are 0.
        """
        width = max(x.shape[-1], self.experts)

        def unit_vectors(_x: mx.array, indices: mx.array) -> mx.array:
            units = indices[..., None] == mx.arange(width)
            return units.astype(mx.float32)

        step, pieces = memory_limits().tokens, []
        for start in range(0, len(x), step):
            rows = slice(start, start + step)
            with ExitStack() as stack:
                stack.enter_context(self._replaced(self._holder, unit_vectors))
                for name in list(self._module):
                    if name.startswith("shared_expert") and not name.endswith("gate"):
                        stack.enter_context(self._replaced(name, mx.zeros_like))
                stack.enter_context(self.masked(mask if mask.ndim == 1 else mask[rows]))
                pieces.append(self._module(x[None, rows])[0, :, : self.experts])
            mx.eval(pieces[-1])
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)

    def outputs(self, x: mx.array, experts: mx.array) -> Iterator[tuple[slice, mx.array]]:
        """Yield slices of `x` (rows, hidden) with the outputs (rows, hidden) of an expert each.

        `experts` (rows,) is the expert of every row.
        """
        holder = submodule(self._module, self._holder)
        step = max(1, memory_limits().block_values // x.shape[-1])
        for start in range(0, len(x), step):
            rows = slice(start, min(start + step, len(x)))
            yield rows, holder(x[rows], experts[rows, None])[:, 0]

    def mask(self, removed: Sequence[int]) -> mx.array:
        """Return the mask (experts,) that removes some experts."""
        mask = np.zeros(self.experts, np.float32)
        mask[list(removed)] = -np.inf
        return mx.array(mask)

    def without(self, removed: Sequence[int]) -> AbstractContextManager[None]:
        """Let the router do without some experts for a while."""
        return self.masked(self.mask(removed))

    @contextmanager
    def masked(self, mask: mx.array) -> Iterator[None]:
        """Let the router add `mask` (experts,) or (tokens, experts) to its logits for a while."""
        router = self._router_module
        if _CORRECTION in router:  # chooses by score + correction, weighs by score
            before = router[_CORRECTION]
            router[_CORRECTION] = before + mask
            try:
                yield
            finally:
                router[_CORRECTION] = before
            return

        def masked(x: mx.array) -> mx.array:
            logits = router(x)
            if not isinstance(logits, mx.array) or logits.shape[-1] != self.experts:
                raise SourceError(
                    f"{type(router).__name__}: quantkit cannot remove experts behind this router; "
                    "leave out `experts`."
                )
            return logits + mask

        with self._replaced(self._router, masked):
            yield

    @contextmanager
    def _replaced(self, name: str, function: Callable[..., mx.array]) -> Iterator[None]:
        before = submodule(self._module, name)
        setattr(self._module, name, function)
        try:
            yield
        finally:
            setattr(self._module, name, before)


def block_in_layer(layer: Any, path: str, block: str, tensors: Collection[str]) -> RoutedBlock:
    """Return the block of experts `block` in the module `layer`, whose path is `path`."""
    inner = submodule(layer, block.removeprefix(f"{path}."))
    return routed_block(inner, tensors, block)


def routed_block(module: Any, tensors: Collection[str], block: str) -> RoutedBlock:
    """Return the block of experts `module`, whose path is `block`.

    `tensors` are the names of its tensors with a row or matrix per expert. Raises SourceError for a
    router that cannot be masked.
    """
    inside = [name.removeprefix(f"{block}.").split(".") for name in tensors]
    holders = {names[0] for names in inside if len(names) > 2}
    routers = {names[0] for names in inside if len(names) == 2}
    if len(holders) != 1 or len(routers) != 1:
        raise SourceError(
            f"{block}: quantkit cannot remove experts of this architecture; leave out `experts`."
        )
    return RoutedBlock(module, holders.pop(), routers.pop())
