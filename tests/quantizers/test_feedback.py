"""Feedback between columns, against one column after another."""

import numpy as np
import pytest

from quantkit.backend import mx
from quantkit.quantizers.feedback import column_by_column


@pytest.mark.parametrize("size", [8, 16, 40])
def test_every_column_sees_the_results_before_it(size):
    rng = np.random.default_rng(size)
    values = rng.normal(size=(2, 5, size)).astype(np.float32)
    feedback = rng.normal(size=(2, size, size)).astype(np.float32) / size
    expected = values.copy()
    for i in range(size):
        expected[..., i] = np.round(3 * expected[..., i]) + i
        later = feedback[:, None, i, i + 1 :]
        expected[..., i + 1 :] -= expected[..., i, None] * later
    found = column_by_column(mx.array(values), mx.array(feedback), lambda i, x: mx.round(3 * x) + i)
    np.testing.assert_allclose(np.array(found), expected)
