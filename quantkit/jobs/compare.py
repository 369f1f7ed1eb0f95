"""Compare: the fidelity of repos to the native model, on held-out text."""

from collections.abc import Sequence

from quantkit.artifacts.fidelity import EVALUATED_TOKENS, Fidelity
from quantkit.artifacts.inventory import with_hashes
from quantkit.artifacts.report import Report
from quantkit.calibration.calibration_set import CalibrationSpec
from quantkit.checkpoint.source import Source, remembered_hashes, with_values
from quantkit.errors import InputError
from quantkit.evaluation import fidelity
from quantkit.jobs.profile import note_skipped_rows
from quantkit.progress import Progress


def compare(
    native: Source,
    repos: Sequence[str],
    spec: CalibrationSpec | None = None,
    *,
    progress: Progress | None = None,
) -> list[Fidelity]:
    """Return the fidelity of each of `repos` (folders or Hub ids) to `native`.

    Raises InputError for a repo with another tokenizer, or one that was calibrated on this text.
    """
    progress = progress or Progress()
    comparison = fidelity.prepare(native, repos, spec or CalibrationSpec(tokens=EVALUATED_TOKENS))
    text = comparison.text.text
    note_skipped_rows(text.name, text.skipped_rows, progress)
    return fidelity.compare(comparison, progress.stage("Comparing", comparison.steps, "steps"))


def require_made_from(native: Source, reports: Sequence[tuple[str, Report]]) -> None:
    """Check that all named repos were made from `native`. Raises InputError.

    Only then may their cards state the fidelity to it.
    """
    native = with_values(native)
    expected = with_hashes(native.inventory.source, remembered_hashes(native))
    for name, report in reports:
        actual = report.plan.source
        if (actual.structure, actual.files) != (expected.structure, expected.files):
            raise InputError(
                f"{name}: was made from {actual.name}, not from this {expected.name}. Compare it "
                "to that one, or leave out `record`."
            )
