"""The one door to mlx.

MLX's Linux wheels link a reference BLAS that is about 50 times slower than OpenBLAS; whichever is
in the process first serves the symbols. So OpenBLAS, where it is installed, is loaded before mlx:
import `mx` from here, never from mlx itself.
"""

import ctypes
import os
import sys
import tempfile
from functools import lru_cache
from itertools import cycle

from quantkit.errors import InputError

_OPENBLAS = "libopenblas.so.0"


def _load_openblas() -> bool:
    """Put OpenBLAS before mlx. True where that is done, or not needed."""
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
    """Let TMPDIR name a folder that is there: mlx compiles in it, and fails without."""
    if (named := os.environ.get("TMPDIR")) and not os.path.isdir(named):  # noqa: PTH112
        os.environ["TMPDIR"] = tempfile.gettempdir()  # the system's, if TMPDIR is of no use


_FAST_BLAS = _load_openblas()
_require_temporary_folder()

import mlx.core as mx  # noqa: E402


def on_cpu() -> bool:
    """Whether mlx computes on the CPU by default."""
    return bool(mx.default_device() == mx.cpu)


def free_memory() -> None:
    """Give back what mlx and the C library keep of memory that is no longer used."""
    mx.clear_cache()
    if sys.platform == "linux":
        _libc().malloc_trim(0)  # glibc keeps gigabytes between the buffers of experts


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def wired_bytes() -> int:
    """What macOS lets this machine's GPU wire. Raises InputError on a machine without Metal."""
    info = mx.device_info() if mx.metal.is_available() else {}
    if "max_recommended_working_set_size" not in info:
        raise InputError("mac:this asks a Mac; this machine has no Metal. Say which: mac:64GB.")
    return int(info["max_recommended_working_set_size"])


def speed_hint() -> str | None:
    """What the user could install to make this machine faster; None where nothing is missing."""
    if _FAST_BLAS or not on_cpu():
        return None
    return (
        "OpenBLAS is not installed: matrix products will be about 50 times slower. "
        "On Debian or Ubuntu: apt-get install libopenblas0-pthread"
    )


def streams() -> "cycle[mx.Stream]":
    """Streams to hand independent work to in turn: one per CPU core up to 4, or the GPU's own.

    Each CPU stream is one thread of mlx's; a GPU keeps itself busy from a single stream.
    """
    return cycle(_cpu_streams() if on_cpu() else [mx.default_stream(mx.default_device())])


@lru_cache(maxsize=1)
def _cpu_streams() -> list[mx.Stream]:
    return [mx.new_stream(mx.cpu) for _ in range(min(4, os.cpu_count() or 1))]


__all__ = ["free_memory", "mx", "on_cpu", "speed_hint", "streams", "wired_bytes"]
