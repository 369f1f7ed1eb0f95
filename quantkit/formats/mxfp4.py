"""MXFP4 (OCP Microscaling Formats v1.0): 32 FP4 (E2M1) values share one power-of-two scale (E8M0).

value = {0, .5, 1, 1.5, 2, 3, 4, 6} with sign bit 8, times 2^(scale - 127); scale 255 is NaN.
Packed as mlx packs it: two values a byte, low nibble first, bytes in uint32.
"""

from functools import lru_cache

import numpy as np

MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_AT_ONCE = 1 << 18  # pairs decoded in one go
_SAFE_SCALE = 252  # 6 * 2^(252 - 127) is still finite in BF16


def to_bfloat16(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Decode `packed` uint32 (rows, in/8) and `scales` uint8 (rows, in/32) to BF16 bits.

    Returns uint16 (rows, in). Exact, since every MXFP4 value is a BF16 value, save for overflow to
    infinity. On the CPU this table is several times faster than mx.dequantize.
    """
    rows, groups = scales.shape
    pairs = packed.view(np.uint8).reshape(rows, groups, 16)
    values = np.empty((rows, groups, 16), np.uint32)
    step = max(1, _AT_ONCE // max(1, groups * 16))  # indexing goes through far more
    for start in range(0, rows, step):
        some = slice(start, start + step)
        index = pairs[some] + (scales[some].astype(np.uint16) << 8)[..., None]
        values[some] = np.take(_pair_table(), index)
    return values.reshape(rows, groups * 16).view(np.uint16)


def nonfinite(packed: np.ndarray, scales: np.ndarray) -> int:
    """Count the decoded values (rows, in) that are NaN or infinite in BF16; cheap for usual
    scales.
    """
    if scales.size == 0 or int(scales.max()) <= _SAFE_SCALE:
        return 0
    values = to_bfloat16(packed, scales)
    return int(np.count_nonzero((values & 0x7F80) == 0x7F80))


def encode(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round float32 `values` (rows, in) to MXFP4: (packed uint32, scales uint8).

    For each block, of the exponent at which the largest value fits and the two beside it, the one
    with the least squared error; values to the nearest magnitude, halves to the even code.
    """
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, 32)
    largest = np.abs(blocks).max(axis=1)
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(largest))
    exponent = np.where(largest > 0, exponent, -127 + 2).astype(np.int32) - 2  # 6 = 1.5 * 2^2
    best_error = np.full(len(blocks), np.inf, np.float32)
    codes = np.zeros(blocks.shape, np.uint8)
    scales = np.zeros(len(blocks), np.uint8)
    for candidate in (exponent, exponent + 1, exponent - 1):
        clipped = np.clip(candidate, -127, 127)
        trial = _nearest_codes(np.ldexp(blocks, -clipped[:, None]))
        decoded = np.ldexp(MAGNITUDES[trial], clipped[:, None])
        error = ((decoded - np.abs(blocks)) ** 2).sum(axis=1)
        better = error < best_error
        best_error[better] = error[better]
        codes[better], scales[better] = trial[better], (clipped + 127)[better]
    codes |= np.signbit(blocks).astype(np.uint8) * np.uint8(8)
    pairs = codes[:, 0::2] | (codes[:, 1::2] << 4)
    rows = values.shape[0]
    return pairs.reshape(rows, -1).view(np.uint32), scales.reshape(rows, -1)


def _nearest_codes(scaled: np.ndarray) -> np.ndarray:
    """Codes 0..7 of the magnitudes nearest to |scaled|; a tie goes to the even code."""
    size = np.abs(scaled)
    codes = np.zeros(size.shape, np.uint8)
    halves = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
    for upper, half in enumerate(halves, start=1):
        codes += (size >= half) if upper % 2 == 0 else (size > half)
    return codes


@lru_cache(maxsize=1)
def _pair_table() -> np.ndarray:
    """uint32 [scale * 256 + byte]: the two BF16 values of a byte, the low nibble's first."""
    signed = np.concatenate([MAGNITUDES, -MAGNITUDES])
    with np.errstate(over="ignore"):
        factors = np.ldexp(np.float32(1), np.arange(256) - 127).astype(np.float32)
        factors[255] = np.nan
        values = factors[:, None] * signed[None]
    # Exact but for overflow, which float32 leaves finite up to 2^128: BF16 has the same range.
    bits = (values.view(np.uint32) >> 16).astype(np.uint32)
    low, high = np.meshgrid(np.arange(16), np.arange(16), indexing="xy")
    pairs = bits[:, low.ravel()] | (bits[:, high.ravel()] << 16)
    return np.ascontiguousarray(pairs.reshape(-1))
