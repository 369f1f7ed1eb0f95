"""Fingerprints of token sequences, to detect text that overlaps with a calibration text."""

import numpy as np

_PASSAGE = 16  # tokens
_SKETCH = 2048  # passages
_FEWEST = 4  # sampled passages, to decide on a single sequence


def sketch(tokens: np.ndarray) -> str:
    """Return a fingerprint of `tokens` (sequences, length), for `overlaps`.

    The form is `m:` and the hashes, 8 hex digits each, of passages that m divides; m is the least
    power of two that leaves at most 2048 of them.
    """
    passages, modulus = _sampled(tokens), 1
    while len(passages) > _SKETCH:
        modulus *= 2
        passages = passages[passages % modulus == 0]
    return f"{modulus}:" + "".join(f"{hashed:08x}" for hashed in passages)


def overlaps(tokens: np.ndarray, fingerprint: str) -> bool:
    """Return whether `tokens` (sequences, length) contain text of the fingerprint.

    That is so if a tenth of all different passages, or half of the passages of one sequence, are in
    it, as far as it samples them. Dialogues that share a template's opening stay below that. The
    fingerprint of a million tokens holds every five hundredth passage.
    """
    divisor, _, text = fingerprint.partition(":")
    modulus = int(divisor or 1)
    sketched = np.array([int(text[i : i + 8], 16) for i in range(0, len(text), 8)], np.uint32)

    def sampled(some: np.ndarray) -> np.ndarray:
        passages = _sampled(some)
        return np.isin(passages[passages % modulus == 0], sketched)

    whole = sampled(tokens)
    if len(whole) and whole.mean() > 0.1 and (whole.sum() > 2 or whole.mean() > 0.5):
        return True
    each = (sampled(sequence[None]) for sequence in tokens)
    return any(len(hits) >= _FEWEST and hits.mean() > 0.5 for hits in each)


def passages(tokens: np.ndarray) -> np.ndarray:
    """Return sorted unique hashes (uint64) of all runs of 16 tokens in `tokens` (sequences,
    length).
    """
    length = min(_PASSAGE, tokens.shape[1])
    runs = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64), length, axis=1)
    factors = np.random.default_rng(0).integers(1, 1 << 63, length, np.uint64) * 2 + 1
    mixed = (runs * factors).sum(axis=-1, dtype=np.uint64)  # wraps around, as hashes do
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return np.unique(mixed)


def _sampled(tokens: np.ndarray) -> np.ndarray:
    """Return the hashes as uint32, which sketches hold."""
    return np.unique((passages(tokens) >> np.uint64(32)).astype(np.uint32))
