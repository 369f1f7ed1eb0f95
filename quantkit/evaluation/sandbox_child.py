"""The process that runs a program of a model: see sandbox.py. Imports nothing of quantkit."""

import builtins
import os
import resource
import sys
from typing import Any

_MEMORY = 2 * 2**30  # bytes of address space
_FILE = 16 * 2**20  # bytes of a file
_REFUSED = (
    "socket.",
    "subprocess.",
    "ctypes.",
    "os.fork",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "os.kill",
    "pty.",
    "shutil.",
    "signal.",
    "urllib.",
    "http.",
    "ftplib.",
    "smtplib.",
    "webbrowser.",
    "fcntl.",
    "mmap.",
    "syslog.",
    "sys.remote_exec",
)
_FILES = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.chmod",
    "os.chown",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.utime",
)
_MODULES = ("_posixsubprocess", "ctypes", "_ctypes", "multiprocessing", "gc")


def main() -> None:
    """Run the program on stdin; its first line is the secret that proves its end."""
    data = sys.stdin.buffer.read().decode()
    secret, _, program = data.partition("\n")
    out = os.dup(1)
    silent = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silent, stream)
    _limit(float(sys.argv[1]))
    folder = os.path.realpath(os.getcwd())
    code = compile(program, "answer.py", "exec")
    sys.addaudithook(_hook(folder))
    exec(code, {"__name__": "answer", "__builtins__": builtins.__dict__})
    os.write(out, secret.encode())


def _limit(seconds: float) -> None:
    """Set the limits of this process; some systems do not know all of them."""
    limits = [
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_FSIZE, _FILE),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, _MEMORY),
        (resource.RLIMIT_DATA, _MEMORY),
    ]
    for kind, most in limits:
        try:
            _, hard = resource.getrlimit(kind)
            limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (limit, limit))
        except (ValueError, OSError):
            continue


def _hook(folder: str) -> Any:
    def inside(path: object) -> bool:
        if isinstance(path, int):
            return True
        return os.path.realpath(os.fsdecode(path)).startswith(folder + os.sep)  # type: ignore[arg-type]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(_REFUSED):
            raise PermissionError(event)
        if event == "import" and args[0].partition(".")[0] in _MODULES:
            raise PermissionError(event)
        writes = event == "open" and (
            (isinstance(args[1], str) and set(args[1]) & set("wax+"))
            or (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        )
        if (writes or event in _FILES) and not inside(args[0]):
            raise PermissionError(event)

    return hook


if __name__ == "__main__":
    main()
