"""What comes after the last layer, a block of the vocabulary at a time.

Logits of a vocabulary of 201,088 would take more memory than a layer; here no more than a block of
them is ever held.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.backend import mx
from quantkit.formats.tiers import Tier
from quantkit.model.streaming import StreamingModel

_LARGEST = 80.0  # exponents above it overflow float32


def label_gradients(model: StreamingModel, h: mx.array, u: mx.array) -> list[mx.array]:
    """d log p(y) / d h, each (batch, tokens, hidden), for labels y drawn from the model.

    `h` is the last layer's output; `u` (draws, batch, tokens) are uniform in [0, 1), one for every
    label: y is where the cumulated probability passes it.
    """
    largest, total = _normalizer(model, h)
    below = mx.zeros(h.shape[:2])
    gradients = [mx.zeros_like(h) for _ in u]

    for rows in model.head_blocks(h.shape[0] * h.shape[1]):

        def logits(x: mx.array, rows: range = rows) -> mx.array:
            return model.head_block(x, rows)

        p = mx.exp(logits(h) - largest[..., None]) / total[..., None]
        cumulated = below[..., None] + mx.cumsum(p, axis=-1)
        for draw, level in enumerate(u):
            # y is the first place at which the cumulated probability is above the level.
            place = (cumulated <= level[..., None]).sum(axis=-1, keepdims=True)
            here = (place < len(rows)) & (level >= below)[..., None]
            hit = (mx.arange(len(rows)) == place) & here
            _, (part,) = mx.vjp(logits, [h], [hit.astype(mx.float32) - p])
            gradients[draw] = gradients[draw] + part
        below = cumulated[..., -1]
        mx.eval(gradients, below)
        mx.clear_cache()
    return gradients


def _normalizer(model: StreamingModel, h: mx.array) -> tuple[mx.array, mx.array]:
    """(largest logit, sum of exp(logit - largest)) for every token."""
    largest = mx.full(h.shape[:2], -mx.inf)
    total = mx.zeros(h.shape[:2])
    for rows in model.head_blocks(h.shape[0] * h.shape[1]):
        z = model.head_block(h, rows)
        top = mx.maximum(largest, z.max(axis=-1))
        total = total * mx.exp(largest - top) + mx.exp(z - top[..., None]).sum(axis=-1)
        largest = top
        mx.eval(largest, total)
    return largest, total


@dataclass(frozen=True)
class Changed:
    """A changed model from its last layer on: that layer's output, and the head's tier if any."""

    h: mx.array
    tier: Tier | None = None


def divergence(model: StreamingModel, h: mx.array, others: Sequence[Changed]) -> list[mx.array]:
    """KL(native || changed) in nats for every token (batch, tokens), for each of `others`.

    With d = changed - native logits it is log(1 + sum p (e^d - 1)) - sum p d, which stays exact
    where d is small.
    """
    largest = mx.full(h.shape[:2], -mx.inf)
    total = mx.zeros(h.shape[:2])
    grown = [mx.zeros(h.shape[:2]) for _ in others]
    shift = [mx.zeros(h.shape[:2]) for _ in others]
    for rows in model.head_blocks(h.shape[0] * h.shape[1]):
        z = model.head_block(h, rows)
        top = mx.maximum(largest, z.max(axis=-1))
        scale = mx.exp(largest - top)
        p = mx.exp(z - top[..., None])
        total = total * scale + p.sum(axis=-1)
        mx.eval(z, p, top, scale, total)
        for i, other in enumerate(others):
            changed = model.head_block(other.h, rows, other.tier)
            d = changed - z
            far = mx.exp(mx.minimum(changed - top[..., None], _LARGEST)) - p
            near = p * mx.expm1(mx.clip(d, -1, 1))
            grown[i] = grown[i] * scale + mx.where(mx.abs(d) < 1, near, far).sum(axis=-1)
            shift[i] = shift[i] * scale + (p * d).sum(axis=-1)
            mx.eval(grown[i], shift[i])
        largest = top
        mx.clear_cache()
    return [mx.log1p(a / total) - b / total for a, b in zip(grown, shift, strict=True)]
