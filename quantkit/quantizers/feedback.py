"""Feedback between columns: each is quantized in turn, and changes the columns after it."""

from collections.abc import Callable

from quantkit.backend import mx

_WIDTH = 16  # columns that change one by one; those beyond change once for all of these


def column_by_column(
    values: mx.array, feedback: mx.array, step: Callable[[int, mx.array], mx.array]
) -> mx.array:
    """Return y (..., out, size) with y_i = step(i, x_i), where x_j is v_j - sum_i<j y_i F_ij.

    `values` v is (..., out, size), `feedback` F (..., size, size); x_i and y_i are (..., out).
    """
    results: list[mx.array] = []
    size = values.shape[-1]
    for start in range(0, size, _WIDTH):
        stop = min(start + _WIDTH, size)
        near = mx.contiguous(values[..., : stop - start])
        block = feedback[..., start:stop, start:stop]
        columns = []
        for i in range(stop - start):
            columns.append(step(start + i, near[..., i]))
            near = near - columns[-1][..., None] * block[..., None, i, :]
        results.append(mx.stack(columns, axis=-1))
        values = values[..., stop - start :] - results[-1] @ feedback[..., start:stop, stop:]
    return mx.concatenate(results, axis=-1)
