"""Run a program of a model in a process of its own, where it can do no harm.

The process has limits on time, memory and files, and an audit hook (PEP 578), which cannot be
removed, refuses network, processes, and files outside its folder. That stops what language models
write, not an attacker who writes machine code.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

_CHILD = Path(__file__).with_name("sandbox_child.py")
_SECONDS = 10.0  # for a program and its tests
_LOOK = 0.5  # seconds between looks at its memory
_MEMORY = 2 * 2**30  # bytes


def passes(program: str, *, seconds: float = _SECONDS) -> bool:
    """Return whether a Python program runs to its end, within `seconds`.

    The process proves it by a secret that the program never sees.
    """
    secret = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", str(_CHILD), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder},
            start_new_session=True,
        )
        try:
            said = _output(process, f"{secret}\n{program}".encode("utf-8", "replace"), seconds)
        finally:
            _end(process)
    return said.decode("ascii", "replace").strip() == secret


def _output(process: subprocess.Popen[bytes], given: bytes, seconds: float) -> bytes:
    """Return the output of a process; nothing if it takes too long, or too much memory.

    macOS has no limit on the memory of a process, so that it is watched.
    """
    end, more = time.monotonic() + seconds, [given]
    while time.monotonic() < end:
        with suppress(subprocess.TimeoutExpired):
            sent = more.pop() if more else None  # once
            return process.communicate(sent, timeout=min(_LOOK, seconds))[0]
        if _resident(process.pid) > _MEMORY:
            break
    return b""


def _resident(pid: int) -> int:
    """Return the bytes of memory that a process uses, 0 if it has ended."""
    told = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return 1024 * int(told.stdout.strip() or 0)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and whatever it may have started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
