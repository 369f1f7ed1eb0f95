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
from contextlib import suppress
from pathlib import Path

_CHILD = Path(__file__).with_name("sandbox_child.py")
_SECONDS = 10.0  # for a program and its tests


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
            given = f"{secret}\n{program}".encode("utf-8", "replace")
            said, _ = process.communicate(given, timeout=seconds)
        except subprocess.TimeoutExpired:
            said = b""
        finally:
            _end(process)
    return said.decode("ascii", "replace").strip() == secret


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and whatever it may have started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
