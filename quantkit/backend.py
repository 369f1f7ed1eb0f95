"""The device that computes: mlx, its memory and its streams.

MLX's Linux wheels link a reference BLAS that is about 50 times slower than OpenBLAS. The library
that is loaded first serves the symbols, so OpenBLAS is loaded before mlx. Import `mx` from this
module, never from mlx itself.
"""

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import cycle

from quantkit.errors import InputError

_OPENBLAS = "libopenblas.so.0"


def _load_openblas() -> bool:
    """Load OpenBLAS before mlx. Return False if OpenBLAS is needed, but not installed."""
    if sys.platform != "linux":
        return True
    if "mlx.core" in sys.modules:
        return _OPENBLAS in _mapped_libraries()
    try:
        ctypes.CDLL(_OPENBLAS, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _mapped_libraries() -> str:
    with open("/proc/self/maps") as maps:
        return maps.read()


def _require_temporary_folder() -> None:
    """Point TMPDIR at an existing folder, without which mlx cannot compile kernels."""
    if (named := os.environ.get("TMPDIR")) and not os.path.isdir(named):  # noqa: PTH112
        os.environ["TMPDIR"] = tempfile.gettempdir()


_FAST_BLAS = _load_openblas()
_require_temporary_folder()

import mlx.core as mx  # noqa: E402


def on_cpu() -> bool:
    """Return whether mlx computes on the CPU by default."""
    return bool(mx.default_device() == mx.cpu)


@dataclass(frozen=True)
class MemoryLimits:
    """The sizes of the pieces in which work is done, beside the weights of a layer.

    `hessian_bytes` are Hessians with the copies that factoring makes, `stream_bytes` the residual
    streams of models that are measured together, `block_values` values of a weight, head or logits,
    `decoded_values` values decoded at once, `tokens` the tokens that a layer takes at once.
    """

    hessian_bytes: int = 1_500_000_000
    stream_bytes: int = 1_000_000_000
    block_values: int = 32_000_000
    decoded_values: int = 16_000_000
    tokens: int = 4096

    @classmethod
    def within(cls, memory: int) -> "MemoryLimits":
        """Scale all limits so that they take about `memory` bytes together."""
        scale = max(memory, _LEAST_MEMORY) / DEFAULT_MEMORY
        return cls(**{name: int(scale * value) for name, value in asdict(cls()).items()})


DEFAULT_MEMORY = 4_000_000_000  # bytes that the default limits take together
_LEAST_MEMORY = 250_000_000
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


def free_memory() -> None:
    """Return unused memory of mlx and of the C library to the system."""
    mx.clear_cache()
    if sys.platform == "linux":
        _libc().malloc_trim(0)  # glibc keeps gigabytes between the buffers of experts


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def wired_bytes() -> int:
    """Return the bytes that macOS lets this machine's GPU wire. Raises InputError without Metal."""
    info = mx.device_info() if mx.metal.is_available() else {}
    if "max_recommended_working_set_size" not in info:
        raise InputError(
            "mac:this needs a Mac, but this machine has no Metal. Name a size: mac:64GB."
        )
    return int(info["max_recommended_working_set_size"])


def speed_hint() -> str | None:
    """Return advice for a faster installation, None if it is complete."""
    if _FAST_BLAS or not on_cpu():
        return None
    return (
        "OpenBLAS is not installed: matrix products will be about 50 times slower. "
        "On Debian or Ubuntu: apt-get install libopenblas0-pthread"
    )


def streams() -> "cycle[mx.Stream]":
    """Return streams for independent work: one per CPU core up to 4, or the GPU's default stream.

    A CPU stream is one thread of mlx; a single stream keeps a GPU busy.
    """
    return cycle(_cpu_streams() if on_cpu() else [mx.default_stream(mx.default_device())])


@lru_cache(maxsize=1)
def _cpu_streams() -> list[mx.Stream]:
    return [mx.new_stream(mx.cpu) for _ in range(min(4, os.cpu_count() or 1))]


__all__ = [
    "DEFAULT_MEMORY",
    "MemoryLimits",
    "free_memory",
    "limited_memory",
    "memory_limits",
    "mx",
    "on_cpu",
    "speed_hint",
    "streams",
    "wired_bytes",
]
