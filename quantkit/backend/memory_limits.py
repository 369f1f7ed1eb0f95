"""The memory limits of all work, in one object that `--memory` scales."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass

from quantkit.errors import InputError


@dataclass(frozen=True)
class MemoryLimits:
    """The sizes of the pieces in which work is done, beside the weights of a layer.

    `hessian_bytes` are Hessians with the copies that factoring makes, `stream_bytes` the residual
    streams of models that are measured together, `block_values` values of a weight or head,
    `decoded_values` values decoded at once, `logits` those at once, some ten arrays of them,
    `tokens` the tokens that a layer takes at once.
    """

    hessian_bytes: int = 1_500_000_000
    stream_bytes: int = 1_000_000_000
    block_values: int = 32_000_000
    decoded_values: int = 16_000_000
    logits: int = 8_000_000
    tokens: int = 4096

    @classmethod
    def within(cls, memory: int) -> "MemoryLimits":
        """Scale all limits so that they take about `memory` bytes together. Raises InputError."""
        if memory < LEAST_MEMORY:
            raise InputError(f"`memory` must be at least {LEAST_MEMORY // 10**6} MB.")
        scale = memory / DEFAULT_MEMORY
        return cls(**{name: int(scale * value) for name, value in asdict(cls()).items()})


DEFAULT_MEMORY = 4_000_000_000  # bytes that the default limits take together
LEAST_MEMORY = 250_000_000
_LIMITS: ContextVar[MemoryLimits] = ContextVar("memory limits", default=MemoryLimits())  # noqa: B039


def memory_limits() -> MemoryLimits:
    """Return the limits in force."""
    return _LIMITS.get()


@contextmanager
def limited_memory(memory: int | None) -> Iterator[None]:
    """Work within about `memory` bytes beside the weights of a layer; None changes nothing.

    Results agree up to the rounding of sums, so a run may be resumed with another limit.
    """
    token = None if memory is None else _LIMITS.set(MemoryLimits.within(memory))
    try:
        yield
    finally:
        if token is not None:
            _LIMITS.reset(token)
