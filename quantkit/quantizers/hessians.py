"""The Hessians of weights, shrunk by a prior that fills in for rare inputs.

A Hessian H is the mean of x x^T over the inputs x of a weight. The experts of a mixture see few
inputs for their width, so theirs is shrunk: towards the inputs of all experts, which share much of
their structure, and towards its own diagonal, which few inputs determine well.
"""

from dataclasses import dataclass
from typing import Any

from quantkit.backend import mx
from quantkit.backend.memory_limits import memory_limits

_COPIES = 8  # of a Hessian, while it is factored


@dataclass(frozen=True)
class Prior:
    """The weights of the pooled inputs and of the diagonal, as multiples of the input width."""

    pooled: float
    diagonal: float


DEFAULT_PRIOR = Prior(3, 3)
PRIORS = (DEFAULT_PRIOR, Prior(12, 3), Prior(3, 1), Prior(0.25, 3))


def shrunk(total: mx.array, count: int, pooled: mx.array, prior: Prior) -> mx.array:
    """Return (S + a w P + b w diag(S) / n) / (n + (a + b) w), the shrunk mean of a matrix.

    S = `total` (w, w) is the sum over its n = `count` inputs, P = `pooled` (w, w) the mean over
    those of all matrices, a and b are the weights of `prior`. Sums that stand below them (2 w, w)
    are shrunk alike, but for the diagonal.
    """
    width = total.shape[-1]
    diagonal = mx.diag(mx.diagonal(total)) * (prior.diagonal * width / max(1, count))
    diagonal = mx.pad(diagonal, [(0, len(total) - width), (0, 0)])
    weight = count + (prior.pooled + prior.diagonal) * width
    return (total + prior.pooled * width * pooled + diagonal) / weight


def objective(weight: mx.array, values: mx.array, hessian: mx.array) -> mx.array:
    """Return (w - v) H (w - v)^T summed over the rows, for every matrix of a stack.

    `weight` and `values` are (..., out, in), `hessian` is (..., in, in), the result (...).
    """
    return row_objective(weight, values, hessian).sum(axis=(-2, -1))


def row_objective(weight: mx.array, values: mx.array, hessian: mx.array) -> mx.array:
    """Return (w - v) H (w - v)^T (..., out, 1) for every row, shaped as for `objective`."""
    d = weight - values
    return ((d @ hessian) * d).sum(axis=-1, keepdims=True)


def batch_size(width: int) -> int:
    """Return how many Hessians (width, width) are factored at once."""
    return max(1, memory_limits().hessian_bytes // (_COPIES * 4 * width * width))


class Hessians:
    """The Hessians (matrices, in, in) of weights with shared inputs, and a cache of their factors.

    `moments` (matrices, in or 2 in, in) are means of x x^T, and below them, if x drifts because
    weights before are quantized, means of (x_native - x) x^T: the `drift`. `importance`
    (matrices, in) is the diagonal of H; `factors` are cached by group size.
    """

    def __init__(self, moments: mx.array) -> None:
        width = moments.shape[-1]
        self.hessian = moments[..., :width, :]
        self.drift = moments[..., width:, :] if moments.shape[-2] > width else None
        self.importance = mx.diagonal(self.hessian, axis1=-2, axis2=-1)
        self.factors: dict[int, Any] = {}
        self._correction: mx.array | None = None

    def target(self, weight: mx.array) -> mx.array:
        """Return W + W C (H + l I)^-1 (matrices, out, in), whose outputs are nearer to native ones.

        C is the drift and l the mean diagonal of H (QEP, Arai and Ichikawa 2025, arXiv 2504.09629).
        Without drift that is W.
        """
        if self.drift is None:
            return weight
        if self._correction is None:
            shift = self.importance.mean(axis=-1)[..., None, None] + 1e-10
            damped = self.hessian + shift * mx.eye(self.hessian.shape[-1])
            with mx.stream(mx.cpu):  # mlx factors on the CPU only
                inverse = mx.linalg.cholesky_inv(mx.linalg.cholesky(damped))
            self._correction = self.drift @ inverse
            mx.eval(self._correction)
        return weight + weight @ self._correction

    def loss(self, weight: mx.array, values: mx.array) -> mx.array:
        """Return the mean of (|W x_native - V x|^2 - |W (x_native - x)|^2) / |W x|^2 (matrices,).

        `weight` W and `values` V are (matrices, out, in). The second term, which V cannot change,
        is not known.
        """
        d = weight - values
        pull = d @ self.hessian
        if self.drift is not None:
            pull = pull + 2 * (weight @ self.drift)
        energy = objective(weight, mx.zeros_like(weight), self.hessian)
        return (pull * d).sum(axis=(-2, -1)) / mx.maximum(energy, 1e-30)


def stacked(values: mx.array) -> mx.array:
    """Return `values` (..., out, in) as a stack: a plain matrix becomes (1, out, in)."""
    return values if values.ndim > 2 else values[None]
