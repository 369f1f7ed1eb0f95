"""Every error quantkit raises on purpose.

    QuantkitError
    └── InputError          what was asked for cannot be done as asked     exit code 2
        ├── SourceError     a checkpoint that is missing, damaged or not understood
        │   └── DamagedError    its headers are fine, its values are not
        ├── HubError        the Hub has no such repo, or none that may be read
        │   └── HubUnreachableError
        ├── TierError       no such tier, or it does not fit a shape
        ├── RecipeError     a recipe that cannot be read or does not cover a checkpoint
        ├── PlanError       a plan that does not belong to a checkpoint
        ├── ProfileError    a profile that does not, or cannot be read
        ├── CalibrationError    text that cannot be calibrated on
        ├── UntrustedCodeError  a tokenizer that wants to run code of its own
        └── OutputError     an output folder, its disk, or a repo that quantkit did not write

A message names the file or tensor, what was found, what was expected, and what to do.
"""


def first_line(exc: BaseException) -> str:
    """What a foreign error says, in one line: its first one, or its type where it says nothing."""
    text = str(exc).strip()
    return text.splitlines()[0] if text else type(exc).__name__


class QuantkitError(Exception):
    """Base of all errors raised on purpose; `exit_code` is the process's."""

    exit_code = 1


class InputError(QuantkitError):
    """Bad input: nothing was written, nothing of the user's was lost."""

    exit_code = 2


class SourceError(InputError):
    """A checkpoint that is missing, damaged or not understood."""


class DamagedError(SourceError):
    """Values that cannot be right: NaN, infinite, or not of the published hash."""


class CacheWarning(UserWarning):
    """A cache that cannot be written: work will be done again, and nothing else is lost."""


class HubError(InputError):
    """The Hugging Face Hub has no such repo, or none that may be read."""


class HubUnreachableError(HubError):
    """The Hugging Face Hub does not answer."""


class TierError(InputError):
    """No such tier, or a tier that does not fit a shape."""


class RecipeError(InputError):
    """A recipe that cannot be read or does not cover a checkpoint."""


class PlanError(InputError):
    """A plan that cannot be read or belongs to another checkpoint."""


class ProfileError(InputError):
    """A profile that cannot be read or belongs to another checkpoint."""


class CalibrationError(InputError):
    """Calibration text that is missing, empty, or not understood."""


class UntrustedCodeError(InputError):
    """A tokenizer comes with Python code of its own, which nobody has allowed to run."""


class OutputError(InputError):
    """An output folder that cannot be used, or a repo that quantkit did not write."""
