"""Profile: from a checkpoint to its sensitivity profile."""

from pathlib import Path

from quantkit.artifacts.sensitivity import SensitivityProfile
from quantkit.checkpoint.source import Source, with_values
from quantkit.progress import Progress
from quantkit.sensitivity.measure import ProfileSettings, Profiling, make, prepare

_LARGE_ERROR = 0.3  # relative, of the median entry: beyond it, tiers are exchanged by chance


def profile(
    source: Source,
    out: Path,
    settings: ProfileSettings | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> SensitivityProfile:
    """Measure the KL cost of every weight in every tier, and write the profile to `out`.

    A source on the Hub is downloaded first. Raises InputError.
    """
    return run_profiling(prepare_profile(source, out, settings, force), progress)


def prepare_profile(
    source: Source, out: Path, settings: ProfileSettings | None = None, force: bool = False
) -> Profiling:
    """Check all inputs of a profile, and read its text. Raises InputError."""
    return prepare(with_values(source), out, settings or ProfileSettings(), force)


def run_profiling(profiling: Profiling, progress: Progress | None = None) -> SensitivityProfile:
    """Measure and write a prepared profile. Raises InputError."""
    progress = progress or Progress()
    text, wanted = profiling.calibration.text, profiling.settings.text
    if text.sequences < wanted.sequences:
        progress.note(f"the text has only {text.tokens:,} of {wanted.tokens:,} tokens")
    note_skipped_rows(text.name, text.skipped_rows, progress)
    profile = make(profiling, progress)
    if profiling.shift_tokens is not None and profile.expert_shift_factor is None:
        progress.note(
            "this profile lacks expert-shift: `force` makes it again, and predicts better"
        )
    error = profile.relative_error or 0
    if error > _LARGE_ERROR:
        progress.note(
            f"the standard error of the median entry is {100 * error:.0f}% of its "
            "KL cost. Give more text: `tokens`"
        )
    return profile


def note_skipped_rows(name: str, rows: int, progress: Progress) -> None:
    """Note the rows of a text that hold no text."""
    if rows:
        progress.note(f"{name}: skipped {rows} rows without text")
