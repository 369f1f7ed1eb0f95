"""Models as stock mlx-lm loads them, to compare with."""

from pathlib import Path
from typing import Any

from quantkit.backend import mx


def plainly_loaded(folder: Path) -> Any:
    """The whole model in memory, in float32, by mlx-lm alone."""
    from mlx_lm.utils import dequantize_model, load_model

    model, config = load_model(folder)
    if "quantization" in config:
        model = dequantize_model(model)
    model.set_dtype(mx.float32)
    return model
