"""Prompts answered in batches."""

import numpy as np

from quantkit.generation.batches import BatchModel, Request


def test_log_probabilities_of_a_model_in_bfloat16(checkpoint, monkeypatch):
    """As on a GPU, where the weights stay as they are stored."""
    monkeypatch.setattr("quantkit.generation.batches.on_cpu", lambda: False)
    model = BatchModel(str(checkpoint))
    assert model.arithmetic == "as stored"
    (done,) = model.complete([Request([2, 5, 7], 1, among=range(64))])
    assert done.log_probabilities.dtype == np.float32
    assert abs(np.exp(done.log_probabilities).sum() - 1) < 0.02
