"""The device that computes: mlx, its memory and its streams.

MLX's Linux wheels link a reference BLAS that is about 50 times slower than OpenBLAS. The library
that is loaded first serves the symbols, so OpenBLAS is loaded before mlx. Import `mx` from this
module, never from mlx itself.
"""

import ctypes
import os
import sys
import tempfile
from functools import lru_cache
from itertools import cycle

from quantkit.errors import InputError

_OPENBLAS = "libopenblas.so.0"
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # of malloc.h
_PAD = 1 << 26  # bytes by which the heap grows
_MOST_FREE = 1 << 30  # bytes that the C library may keep


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


def _keep_pages() -> None:
    """Let glibc keep the pages of large arrays for the next ones.

    By default it maps and unmaps each of them, and a third of the time goes into page faults.
    `free_memory` returns what it keeps beyond a limit.
    """
    if sys.platform == "linux" and hasattr(_libc(), "mallinfo2"):
        for setting, value in (
            (_M_MMAP_MAX, 0),
            (_M_TRIM_THRESHOLD, _MOST_FREE),
            (_M_TOP_PAD, _PAD),
            (_M_ARENA_MAX, 1),
        ):
            _libc().mallopt(setting, value)


class _HeapUse(ctypes.Structure):
    """The struct mallinfo2 of malloc.h, whose eighth field are the bytes in use."""

    _fields_ = [(f"field_{i}" if i != 7 else "used", ctypes.c_size_t) for i in range(10)]


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallinfo2"):
        libc.mallinfo2.restype = _HeapUse
    return libc


_FAST_BLAS = _load_openblas()
_require_temporary_folder()
_keep_pages()

import mlx.core as mx  # noqa: E402


def on_cpu() -> bool:
    """Return whether mlx computes on the CPU by default."""
    return bool(mx.default_device() == mx.cpu)


def free_memory() -> None:
    """Return unused memory of mlx, and much of the C library's, to the system."""
    mx.clear_cache()
    if sys.platform == "linux" and hasattr(_libc(), "malloc_trim") and _kept_bytes() > _MOST_FREE:
        _libc().malloc_trim(0)


def _kept_bytes() -> int:
    """Return the resident bytes that no array uses, 2^63 if the C library does not tell."""
    if not hasattr(_libc(), "mallinfo2"):
        return 1 << 63
    with open("/proc/self/statm") as sizes:
        resident = int(sizes.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident - int(_libc().mallinfo2().used)


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
    "free_memory",
    "mx",
    "on_cpu",
    "speed_hint",
    "streams",
    "wired_bytes",
]
