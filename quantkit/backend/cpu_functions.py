"""Attention and activations on a CPU, several times faster than mlx's by numpy's exponentials."""

from typing import Any, cast

import numpy as np

from quantkit.backend import mx, on_cpu
from quantkit.backend.exponentials import cpu_sigmoid, cpu_softmax, cpu_tanh

_SCORES = 4_000_000  # at once, so that they stay in the processor's cache
_FEWEST_ROWS = 16
_mlx_attention = mx.fast.scaled_dot_product_attention
_mlx_sigmoid, _mlx_tanh = mx.sigmoid, mx.tanh


def speed_up_mlx() -> None:
    """Let mlx-lm's modules of this process call the functions here in place of mlx's."""
    mx.fast.scaled_dot_product_attention = attention
    mx.sigmoid, mx.tanh = sigmoid, tanh
    mx.disable_compile()  # compiled activations have mlx's own functions inside


def sigmoid(x: mx.array, **settings: Any) -> mx.array:
    """Return 1 / (1 + e^-x), of the shape of `x` (...), as `mx.sigmoid` does."""
    if not on_cpu() or x.dtype != mx.float32 or settings:
        return _mlx_sigmoid(x, **settings)
    return cast(mx.array, cpu_sigmoid(x))


def tanh(x: mx.array, **settings: Any) -> mx.array:
    """Return the hyperbolic tangent, of the shape of `x` (...), as `mx.tanh` does."""
    if not on_cpu() or x.dtype != mx.float32 or settings:
        return _mlx_tanh(x, **settings)
    return cast(mx.array, cpu_tanh(x))


def row_dots(a: mx.array, b: mx.array) -> mx.array:
    """Return the sums of a * b (..., n) over the last axis, without that product in memory."""
    if not on_cpu():
        return (a * b).sum(axis=-1)
    return mx.array(np.einsum("...i,...i->...", np.asarray(a), np.asarray(b)))


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **settings: Any
) -> mx.array:
    """Return (batch, heads, tokens, width), as `mx.fast.scaled_dot_product_attention` does.

    `q` is (batch, heads, tokens, width), `k` and `v` are (batch, fewer heads, keys, width); `mask`
    is None, "causal" or broadcast to (batch, heads, tokens, keys); `settings` may hold `sinks`
    (heads,).
    """
    sinks = settings.get("sinks")
    if not on_cpu() or q.dtype != mx.float32 or settings.keys() - {"sinks"}:
        return _mlx_attention(q, k, v, scale=scale, mask=mask, **settings)
    batch, heads, tokens, _ = q.shape
    step = max(_FEWEST_ROWS, _SCORES // (batch * heads * k.shape[2]))
    blocks = []
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        last = k.shape[2] - tokens + stop if isinstance(mask, str) else k.shape[2]
        block = mask
        if isinstance(mask, mx.array) and mask.ndim > 1 and mask.shape[-2] > 1:
            block = mask[..., start:stop, :]
        rows = q[..., start:stop, :] * scale
        blocks.append(_mixed(rows, k[..., :last, :], v[..., :last, :], block, sinks))
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=2)


def _mixed(q: mx.array, k: mx.array, v: mx.array, mask: Any, sinks: mx.array | None) -> mx.array:
    """Return `attention` for scaled queries, the last of which sees all keys."""
    batch, heads, tokens, _ = q.shape
    shared, keys = k.shape[1:3]
    scores = q.reshape(batch, shared, -1, q.shape[-1]) @ k.swapaxes(-1, -2)
    scores = scores.reshape(batch, heads, tokens, keys)
    if isinstance(mask, str):
        mask = mx.arange(keys - tokens, keys)[:, None] >= mx.arange(keys)
    if mask is not None:
        least = mx.finfo(mx.float32).min
        scores = mx.where(mask, scores, least) if mask.dtype == mx.bool_ else scores + mask
    sinks = mx.full((heads,), mx.finfo(mx.float32).min) if sinks is None else sinks
    p: Any = cpu_softmax(scores, mx.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1)))
    mixed: mx.array = p.reshape(batch, shared, -1, keys) @ v
    return mixed.reshape(batch, heads, tokens, v.shape[-1])
