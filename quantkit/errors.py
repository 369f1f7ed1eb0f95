"""Every error quantkit raises on purpose.

    QuantkitError
    └── InputError              the request cannot be fulfilled         exit code 2
        ├── SourceError         a checkpoint is missing, damaged or not understood
        │   └── DamagedError    a checkpoint with readable headers holds impossible values
        ├── HubError            a Hub repo does not exist, or may not be read
        │   └── HubUnreachableError
        ├── TierError           a tier does not exist, or does not fit a shape
        ├── RecipeError         a recipe cannot be read, or does not cover a checkpoint
        ├── PlanError           a plan cannot be read, or belongs to another checkpoint
        ├── ProfileError        a sensitivity profile cannot be read, or belongs to another one
        ├── CalibrationError    a calibration text cannot be used
        ├── UntrustedCodeError  a tokenizer needs to run Python code of its repo
        └── OutputError         an output directory, its disk, or a repo that cannot be used

A message names the file, tensor or `field`, the expected and the actual value, and a way out.
Fields of the library stand in backticks; the command line shows them as its own options.
"""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def in_field(name: str) -> Iterator[None]:
    """Name the field in errors about its value, such as `budget`, unless they name it already."""
    try:
        yield
    except InputError as exc:
        if f"`{name}`" in str(exc):
            raise
        raise type(exc)(f"`{name}`: {exc}") from exc


def first_line(exc: BaseException) -> str:
    """Return the first line of a foreign error's message, or its type if the message is empty."""
    text = str(exc).strip()
    return text.splitlines()[0] if text else type(exc).__name__


def fault(exc: Exception) -> str:
    """Return the fault in a JSON value, without Python's own words for it."""
    if isinstance(exc, MalformedError):
        return str(exc)
    return f"{exc.args[0]!r} is missing" if isinstance(exc, KeyError) else "malformed"


class QuantkitError(Exception):
    """Base of all errors raised on purpose; `exit_code` is the exit code of the process."""

    exit_code = 1


class InputError(QuantkitError):
    """Bad input: no output was written, and no file of the user was lost."""

    exit_code = 2


class SourceError(InputError):
    """A checkpoint is missing, damaged or not understood."""


class DamagedError(SourceError):
    """A value is NaN or infinite, or a file does not have its published hash."""


class UnreadableError(SourceError):
    """A file of a checkpoint cannot be read now, as on a disk that is gone for a while."""


class MalformedError(TypeError, ValueError):
    """A value read from JSON is malformed. Readers of files turn it into an InputError."""


class CacheWarning(UserWarning):
    """The cache cannot be written: the work is repeated next time."""


class HubError(InputError):
    """A repo on the Hugging Face Hub does not exist, or may not be read."""


class HubUnreachableError(HubError):
    """The Hugging Face Hub does not answer."""


class TierError(InputError):
    """A tier does not exist, or does not fit a shape."""


class RecipeError(InputError):
    """A recipe cannot be read, or does not cover a checkpoint."""


class PlanError(InputError):
    """A plan cannot be read, or belongs to another checkpoint."""


class ProfileError(InputError):
    """A sensitivity profile cannot be read, or belongs to another checkpoint."""


class CalibrationError(InputError):
    """A calibration text is missing, empty, or not understood."""


class UntrustedCodeError(InputError):
    """A tokenizer needs to run Python code of its repo, and the user has not allowed it."""


class OutputError(InputError):
    """An output directory cannot be used, or quantkit did not write the repo in it."""
