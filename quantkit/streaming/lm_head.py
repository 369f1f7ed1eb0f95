"""The output head, a block of the vocabulary at a time.

Logits of 201,088 tokens would take more memory than a layer; here only a block of them exists.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from quantkit.backend import free_memory, mx
from quantkit.backend.exponentials import exp, expm1
from quantkit.formats.tiers import Tier
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.weight_loader import StoredRows

_TOGETHER = 6  # models to compare in one walk over the native logits, so that progress shows
_SMALL = 0.5  # growth of the normalizer up to which its log is taken by log1p
_LEAST_GROWTH, _MOST_GROWTH = -0.99, 1e4  # the same, for sums of a single pass
_LEAST_SPREAD = 1e-3  # 1 - the sum of p^2, which float32 knows to 1e-7
_LARGEST = 80.0  # exponents above it overflow float32


def label_gradients(model: StreamingModel, h: mx.array, u: mx.array) -> list[mx.array]:
    """Return w d log p(y) / d h, each (batch, tokens, hidden), for labels y drawn from q.

    Their squares have the mean of (d log p(y) / d h)^2 for labels drawn from the model's p. As q is
    p |e_y - p|^2, normalized, and w^2 = p / q, large gradients are drawn more often and vary less:
    importance sampling. Where p has nearly all of its mass at one token, q is p itself.

    `h` (batch, tokens, hidden) is the last layer's output; `u` (draws, batch, tokens) are uniform
    in [0, 1): y is the token at which the cumulated q exceeds u.
    """
    largest, total, squares = _normalizer(model, h)
    spread = 1 - squares[..., None]  # the sum of p |e_y - p|^2
    plain = spread < _LEAST_SPREAD
    gradients, inverse = [mx.zeros_like(h) for _ in u], [mx.ones((*h.shape[:2], 1)) for _ in u]
    below = mx.zeros((*h.shape[:2], 1))
    blocks = list(model.head_blocks(h.shape[0] * h.shape[1]))
    for rows in blocks:

        def logits(x: mx.array, rows: range = rows) -> mx.array:
            return model.head_block(x, rows)

        p = exp(logits(h) - largest[..., None]) / total[..., None]
        ratio = mx.where(plain, 1.0, (1 - 2 * p + squares[..., None]) / spread)  # q / p
        cumulated = below + mx.cumsum(p * ratio, axis=-1)
        for draw, level in enumerate(u[..., None]):
            place = (cumulated <= level).sum(axis=-1, keepdims=True)
            if rows is blocks[-1]:
                place = mx.minimum(place, len(rows) - 1)  # sums of floats may stay below 1
            here = (place < len(rows)) & (level >= below)
            hit = (mx.arange(len(rows)) == place) & here
            _, (term,) = mx.vjp(logits, [h], [hit.astype(mx.float32) - p])
            gradients[draw] = gradients[draw] + term
            inverse[draw] = mx.where(here, (hit * ratio).sum(-1, keepdims=True), inverse[draw])
        below = cumulated[..., -1:]
        mx.eval(gradients, inverse, below)
    free_memory()
    return [g / mx.sqrt(x) for g, x in zip(gradients, inverse, strict=True)]


def _normalizer(model: StreamingModel, h: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return (largest logit, sum of exp(logit - largest), sum of p^2) for every token."""
    peak, targets = _Peak(h.shape[:2]), mx.zeros(h.shape[:2], mx.int32)
    squares = mx.zeros(h.shape[:2])
    for rows in model.head_blocks(h.shape[0] * h.shape[1]):
        before = peak.top
        p = peak.see(model.head_block(h, rows), rows, targets)
        squares = squares * exp(2 * (before - peak.top)) + (p * p).sum(axis=-1)
        mx.eval(squares)
    return peak.top, peak.total, squares / mx.square(peak.total)


@dataclass(frozen=True)
class ChangedModel:
    """A changed model behind its last layer.

    `h` (batch, tokens, hidden) is the output of its last layer, `tier` the tier of its head,
    `model` the owner of its head, by default the native model.
    """

    h: mx.array
    tier: Tier | None = None
    model: StreamingModel | None = None


@dataclass(frozen=True)
class TokenComparison:
    """A changed model compared to the native one, every array (batch, tokens).

    `kl` is KL(native || changed) in nats, `same_top` whether both predict the same token,
    `native_nll` and `nll` are -log p of the target token.
    """

    kl: mx.array
    same_top: mx.array
    native_nll: mx.array
    nll: mx.array


def divergence(
    model: StreamingModel, h: mx.array, others: Sequence[ChangedModel]
) -> Iterator[mx.array]:
    """Yield KL(native || changed) in nats (batch, tokens) for each of `others`.

    `h` (batch, tokens, hidden) is the output of the native model's last layer.
    """
    for first in range(0, len(others), _TOGETHER):
        some = others[first : first + _TOGETHER]
        native, targets = _Peak(h.shape[:2]), mx.zeros(h.shape[:2], mx.int32)
        sums = [_Shift(h.shape[:2]) for _ in some]
        for rows, z, p, scale in _native_blocks(model, h, native, targets):
            for other, shift in zip(some, sums, strict=True):
                changed = (other.model or model).head_block(other.h, rows, other.tier)
                shift.add(p, changed - z, scale)
        for other, shift in zip(some, sums, strict=True):
            exact = shift.is_exact(native)
            yield shift.kl(native) if exact else compared(model, h, [other], targets)[0].kl


def _native_blocks(
    model: StreamingModel, h: mx.array, native: "_Peak", targets: mx.array
) -> Iterator[tuple[range, mx.array, mx.array, mx.array]]:
    """Show `native` all blocks of the vocabulary; yield the rows of each, its logits z, p = exp(z -
    largest), and by how much (batch, tokens) a new largest logit scales former sums over p.
    """
    for rows in model.head_blocks(h.shape[0] * h.shape[1]):
        z, before = model.head_block(h, rows), native.top
        p = native.see(z, rows, targets)
        scale = exp(before - native.top)
        mx.eval(z, p, scale)
        yield rows, z, p, scale
    free_memory()


class _Shift:
    """Running sums of one changed model, with d = changed - native logits: p (e^d - 1) and p d.

    p is relative to the largest native logit so far.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._grown = mx.zeros(shape)
        self._shift = mx.zeros(shape)
        self._largest = mx.zeros(shape)

    def add(self, p: mx.array, d: mx.array, scale: mx.array) -> None:
        """Add `p` and `d` (batch, tokens, rows) of a block of the vocabulary.

        Former sums are multiplied by `scale` (batch, tokens), which a new largest logit demands.
        """
        grown = (p * expm1(mx.minimum(d, _LARGEST))).sum(axis=-1)
        self._grown = self._grown * scale + grown
        self._shift = self._shift * scale + (p * d).sum(axis=-1)
        self._largest = mx.maximum(self._largest, d.max(axis=-1))
        mx.eval(self._grown, self._shift, self._largest)

    def is_exact(self, native: "_Peak") -> bool:
        """Return whether `kl` is exact: no sum overflows or nearly cancels."""
        growth = self._growth(native)
        exact = (growth > _LEAST_GROWTH) & (growth < _MOST_GROWTH) & (self._largest < _LARGEST)
        return bool(exact.all().item())

    def kl(self, native: "_Peak") -> mx.array:
        """Return KL(native || changed) in nats (batch, tokens)."""
        return mx.log1p(self._growth(native)) - self._shift / native.total

    def _growth(self, native: "_Peak") -> mx.array:
        return self._grown / native.total


def compared(
    model: StreamingModel, h: mx.array, others: Sequence[ChangedModel], targets: mx.array
) -> list[TokenComparison]:
    """Compare each of `others` to the native model, whose last layer gave `h` (batch, tokens,
    hidden).

    `targets` are (batch, tokens). With d = changed - native logits, KL is log(1 + sum p (e^d - 1))
    - sum p d, which stays exact for small d; for a large sum, the log is the difference of both
    normalizers.
    """
    native = _Peak(h.shape[:2])
    peaks = [_Peak(h.shape[:2]) for _ in others]
    grown = [mx.zeros(h.shape[:2]) for _ in others]
    shift = [mx.zeros(h.shape[:2]) for _ in others]
    for rows, z, p, scale in _native_blocks(model, h, native, targets):
        for i, other in enumerate(others):
            changed = (other.model or model).head_block(other.h, rows, other.tier)
            peaks[i].see(changed, rows, targets)
            d = changed - z
            far = exp(mx.minimum(changed - native.top[..., None], _LARGEST)) - p
            near = p * expm1(mx.clip(d, -1, 1))
            grown[i] = grown[i] * scale + mx.where(mx.abs(d) < 1, near, far).sum(axis=-1)
            shift[i] = shift[i] * scale + (p * d).sum(axis=-1)
            mx.eval(grown[i], shift[i])
    comparison = []
    for peak, a, b in zip(peaks, grown, shift, strict=True):
        growth = a / native.total
        far_off = peak.normalizer - native.normalizer
        change = mx.where(mx.abs(growth) < _SMALL, mx.log1p(mx.maximum(growth, -_SMALL)), far_off)
        comparison.append(
            TokenComparison(
                kl=change - b / native.total,
                same_top=peak.token == native.token,
                native_nll=native.normalizer - native.at_target,
                nll=native.normalizer + change - peak.at_target,
            )
        )
    return comparison


def divergence_gradient(
    model: StreamingModel, h: mx.array, other: mx.array, stored: StoredRows | None = None
) -> tuple[mx.array, mx.array]:
    """Return KL(native || changed) (batch, tokens), and its gradient with respect to `other`.

    `h` and `other` (batch, tokens, hidden) are the outputs of the last layers; `stored` takes the
    place of the changed head's values. The gradient of a logit is q - p.
    """
    shape, targets = h.shape[:2], mx.zeros(h.shape[:2], mx.int32)
    native, changed = _Peak(shape), _Peak(shape)
    for rows in model.head_blocks(shape[0] * shape[1]):
        native.see(model.head_block(h, rows), rows, targets)
        changed.see(model.head_block(other, rows, stored), rows, targets)
    kl, gradient = mx.zeros(shape), mx.zeros_like(other)
    for rows in model.head_blocks(shape[0] * shape[1]):

        def logits(x: mx.array, rows: range = rows) -> mx.array:
            return model.head_block(x, rows, stored)

        log_p = model.head_block(h, rows) - native.normalizer[..., None]
        p, log_q = exp(log_p), logits(other) - changed.normalizer[..., None]
        kl = kl + (p * (log_p - log_q)).sum(axis=-1)
        _, (term,) = mx.vjp(logits, [other], [exp(log_q) - p])
        gradient = gradient + term
        mx.eval(kl, gradient)
    free_memory()
    return kl, gradient


class _Peak:
    """Running statistics of the logits of every token.

    The largest logit and its token, the sum of exp(logit - largest), and the logit of the target.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.top = mx.full(shape, -mx.inf)
        self.total = mx.zeros(shape)
        self.token = mx.zeros(shape, mx.int32)
        self.at_target = mx.zeros(shape)

    @property
    def normalizer(self) -> mx.array:
        """log of the sum of exp(logit) (batch, tokens)."""
        return self.top + mx.log(self.total)

    def see(self, z: mx.array, rows: range, targets: mx.array) -> mx.array:
        """Add logits `z` (batch, tokens, rows) of some rows of the vocabulary.

        Returns their exp(logit - largest), of the same shape.
        """
        place = z.argmax(axis=-1)
        highest = mx.take_along_axis(z, place[..., None], axis=-1)[..., 0]
        self.token = mx.where(highest > self.top, place.astype(mx.int32) + rows.start, self.token)
        before, self.top = self.top, mx.maximum(self.top, highest)
        p = exp(z - self.top[..., None])
        self.total = self.total * exp(before - self.top) + p.sum(axis=-1)
        here = (targets >= rows.start) & (targets < rows.stop)
        index = mx.where(here, targets - rows.start, 0)
        comparison = mx.take_along_axis(z, index[..., None], axis=-1)[..., 0]
        self.at_target = mx.where(here, comparison, self.at_target)
        mx.eval(self.top, self.total, self.token, self.at_target)
        return p
