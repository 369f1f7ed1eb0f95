"""Text for the tokenizer of tests.tiny."""

import json
from pathlib import Path

import numpy as np


def words(path: Path, seed: int) -> str:
    """Write 40 paragraphs of 250 random words to `path`; gives its name."""
    rng = np.random.default_rng(seed)
    paragraphs = rng.integers(3, 64, (40, 250))
    path.write_text("\n\n".join(" ".join(f"w{i}" for i in row) for row in paragraphs))
    return str(path)


def rows(path: Path, seed: int, count: int, length: int) -> Path:
    """Write `count` rows of `length` random words to a JSON-lines file; gives its path."""
    rng = np.random.default_rng(seed)
    lines = [" ".join(f"w{i}" for i in rng.integers(3, 64, length)) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path
