"""The options of `quantize` beside the choice of tiers, and their checks."""

from dataclasses import dataclass, field
from pathlib import Path

from quantkit.calibration.calibration_set import CalibrationSpec
from quantkit.calibration.documents import DEFAULT
from quantkit.errors import InputError
from quantkit.jobs.planning import PlanRequest
from quantkit.quantizers.registry import SEARCH, find_quantizer
from quantkit.storage.output_dir import require_apart
from quantkit.writer.writer import SHARD_BYTES


@dataclass(frozen=True)
class QuantizeOptions:
    """The options of `quantize` beside the choice of tiers.

    `profile_text` is read for a profile that has to be made, `quantizer_text` by a calibrated
    quantizer: `quantizer_tokens` of it, or for None as many as `needed_tokens` returns.
    `tuning_steps` are steps of scale tuning after it. An `imatrix` (a GGUF file of llama.cpp) takes
    the place of that text for the quantizer search. `command` is the command line that the card
    states, `base_model` the Hub id that it names, by default the source's own.
    """

    profile_text: CalibrationSpec = field(default_factory=CalibrationSpec)
    quantizer_text: CalibrationSpec = field(default_factory=CalibrationSpec)
    quantizer_tokens: int | None = None
    tuning_steps: int = 0
    imatrix: Path | None = None
    shard_bytes: int = SHARD_BYTES
    command: str | None = None
    base_model: str | None = None
    force: bool = False


def check_request(out: Path, request: PlanRequest, options: QuantizeOptions) -> None:
    """Check everything that needs no checkpoint. Raises InputError."""
    request.require_consistent()
    for path in (request.plan, Path(request.profile) if request.profile else None):
        require_apart(out, path if path is not None and path.exists() else None)
    if options.imatrix is not None:
        require_imatrix_alone(request.quantizer or SEARCH, options)
    elif request.plan is None:
        require_tunable(options.tuning_steps, request.quantizer_name)
        profiles = request.budget is not None and request.profile is None
        require_text_read(request.quantizer_name, options, profiles)
    if options.shard_bytes < 1:
        raise InputError("`shard_bytes` must be larger than 0. Write it like 5GB.")


def require_tunable(tuning_steps: int, quantizer: str) -> None:
    """Refuse scale tuning of weights that are rounded to nearest. Raises InputError."""
    if tuning_steps and not find_quantizer(quantizer).calibrated:
        raise InputError("`tuning_steps` needs `quantizer` search or gptq.")


def require_text_read(quantizer: str, options: QuantizeOptions, profiles: bool = False) -> None:
    """Refuse text that nothing would read. Raises InputError.

    `profiles` says whether a profile is to be made, which reads some, too.
    """
    if find_quantizer(quantizer).calibrated:
        return
    if options.quantizer_tokens is not None:
        raise InputError(
            f"`quantizer_tokens` is for `quantizer` search and gptq: {quantizer} reads no text."
        )
    if options.quantizer_text.name != DEFAULT and not profiles:
        raise InputError(
            f"`calibration`: nothing would read it, since `quantizer` {quantizer} needs no text. "
            "Leave it out, or choose search or gptq."
        )


def require_imatrix_alone(quantizer: str, options: QuantizeOptions) -> None:
    """Refuse an imatrix beside another quantizer than search, or beside text. Raises InputError."""
    if quantizer != SEARCH:
        raise InputError(f"`imatrix` is for `quantizer` {SEARCH}: {quantizer} does not use it.")
    if options.tuning_steps or options.quantizer_tokens is not None:
        raise InputError(
            "`imatrix` takes the place of text: leave out `quantizer_tokens` and `tuning_steps`."
        )
