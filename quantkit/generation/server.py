"""mlx-lm's server for one repo."""

import os
import signal
import socket
import sys

from quantkit.backend import mx  # noqa: F401  (before mlx-lm: see backend)
from quantkit.errors import InputError, first_line
from quantkit.generation.chat_model import require_repo


def serve(repo: str, host: str, port: int, options: list[str]) -> None:
    """Run mlx-lm's server in this process, which ends with it. `options` are mlx_lm.server's.

    Raises OutputError for an invalid repo, InputError for an address that cannot be bound.
    """
    require_repo(repo)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family):
            pass
    except (OSError, UnicodeError) as exc:
        raise InputError(
            f"{host}, port {port}: cannot be bound ({first_line(exc)}). Give another `port` or "
            "`host`."
        ) from exc
    from mlx_lm import server

    sys.argv = ["mlx_lm.server", "--model", repo, "--host", host, "--port", str(port), *options]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: _end(0))
    try:
        server.main()
    except Exception as exc:  # noqa: BLE001  (mlx-lm raises anything)
        print(f"error: mlx_lm.server: {first_line(exc)}.", file=sys.stderr)
        _end(2)
    _end(0)


def _end(code: int) -> None:
    """End the process at once, since the server's generation thread does not end by itself."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
