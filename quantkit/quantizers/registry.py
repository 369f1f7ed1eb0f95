"""The registry of quantizers: how the integers, scales and biases of an affine tier are chosen.

Imports no mlx, so that options and help texts can read it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from quantkit.errors import InputError


@dataclass(frozen=True)
class Quantizer:
    """A quantizer. `module` implements it as `quantize(weight, hessians, tier, dtype)`; None for
    mlx's own rounding, which needs no calibration text."""

    name: str
    summary: str
    module: str | None = None

    @property
    def calibrated(self) -> bool:
        return self.module is not None

    def function(self) -> Callable[..., Any]:
        """Import the implementation."""
        assert self.module is not None, self.name
        function: Callable[..., Any] = import_module(self.module).quantize
        return function


RTN, SEARCH = "rtn", "search"
QUANTIZERS = {
    quantizer.name: quantizer
    for quantizer in (
        Quantizer(RTN, "round to nearest"),
        Quantizer(SEARCH, "least error per group", "quantkit.quantizers.search"),
        Quantizer("gptq", "with error feedback", "quantkit.quantizers.gptq"),
    )
}
DEFAULT_QUANTIZER = "gptq"


def find_quantizer(name: str) -> Quantizer:
    """Return a quantizer by name. Raises InputError for an unknown one."""
    if name not in QUANTIZERS:
        raise InputError(f"unknown `quantizer` {name!r}. Use one of {', '.join(QUANTIZERS)}.")
    return QUANTIZERS[name]
