"""Progress of long work, shown by the command line and by any other caller that wants it."""

from collections.abc import Callable

Stage = Callable[[int, str], None]
"""Called with the work just done, in the unit of its stage, and the name of the current item."""


class Progress:
    """Receives the stages and notes of a job; stages may overlap. This base class shows nothing."""

    def stage(self, title: str, total: int, unit: str = "bytes") -> Stage:
        """Begin a stage of `total` bytes, steps or layers, and return its callback."""
        del title, total, unit
        return silent

    def note(self, text: str) -> None:
        """Tell the user about a decision or a surprise."""
        del text


def silent(_done: int, _name: str) -> None:
    """Show nothing."""
