"""Text for the tokenizer of tests.tiny."""

from pathlib import Path

import numpy as np


def words(path: Path, seed: int) -> str:
    """Write 4,000 random words to `path`; gives its name."""
    rng = np.random.default_rng(seed)
    path.write_text(" ".join(f"w{i}" for i in rng.integers(3, 64, 4000)))
    return str(path)
