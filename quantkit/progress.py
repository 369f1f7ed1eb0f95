"""How long work tells how far it is."""

from collections.abc import Callable

Progress = Callable[[int, str], None]
"""Called with how much was just done (bytes or steps) and the name of what is being done."""
