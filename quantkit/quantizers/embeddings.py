"""Hessians of embeddings: the covariance of the gradient at their output.

An error e in a row moves the residual stream at every occurrence of its token, at a KL cost of
1/2 (g . e)^2, with g = d log p(y) / d e for labels y drawn from the model (the expansion behind
sensitivity profiles). The mean of g g^T over the tokens of the text therefore takes the place of
the Hessian of the inputs. For a tied head, the Hessian of the head's inputs is added.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from quantkit.backend import free_memory, mx
from quantkit.progress import Stage
from quantkit.storage.work_dir import WorkDirectory
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.layer_trace import hooked
from quantkit.streaming.lm_head import label_gradients
from quantkit.streaming.weight_loader import Call

_SEED = 0
_ROWS = 64  # of a head, to find the factor on its products


def embedding_hessians(
    model: StreamingModel,
    names: Sequence[str],
    tokens: mx.array,
    work: WorkDirectory,
    progress: Stage,
) -> dict[str, mx.array]:
    """Return the Hessians (width, width) in float32 of the embeddings `names`.

    Runs `tokens` (sequences, length) forward and backward, a layer at a time; a killed run resumes
    at its last layer. A table that the text does not reach gets zeros. Raises ValueError or
    RuntimeError for a layer that mlx cannot differentiate.
    """
    layers = len(model.layers)
    if not work.has("e-h.npy"):

        def seen(number: int, call: Call, _y: mx.array) -> None:
            work.save_array(f"e-x-{number}.npy", call.x)
            progress(0, f"gradients, layer {number}")

        work.save_array("e-h.npy", model.run(tokens, seen))
    h = work.array("e-h.npy")
    if not any(work.has(f"e-g-{n}.npy") for n in range(layers + 1)):
        levels = np.random.default_rng(_SEED).random((1, *tokens.shape), np.float32)
        (g,) = label_gradients(model, h, mx.array(levels))
        work.save_array(f"e-g-{layers}.npy", g)
    reached = min(n for n in range(layers + 1) if work.has(f"e-g-{n}.npy"))
    g = work.array(f"e-g-{reached}.npy")
    calls = model.calls(tokens[:1])
    for number in reversed(range(reached)):
        progress(0, f"gradients, layer {number}")
        call = Call(work.array(f"e-x-{number}.npy"), calls[number].args, calls[number].kwargs)
        g = _back(model, number, call, g)
        work.save_array(f"e-g-{number}.npy", g)
        for used in (f"e-x-{number}.npy", f"e-g-{number + 1}.npy"):
            work.drop(used)
        free_memory()
    hessians = {name: _covariance(model.behind_embedding(name, tokens, g)) for name in names}
    if (head := model.head_weight.name) in names:
        x = model.head_input(h)
        hessians[head] = hessians[head] + _slope(model, h, x) ** 2 * _covariance(x)
    mx.eval(hessians)
    return hessians


def drop_gradients(model: StreamingModel, work: WorkDirectory) -> None:
    """Remove the scratch files of `embedding_hessians`."""
    for number in range(len(model.layers) + 1):
        work.drop(f"e-x-{number}.npy")
        work.drop(f"e-g-{number}.npy")
    work.drop("e-h.npy")


def _back(model: StreamingModel, number: int, call: Call, at_output: mx.array) -> mx.array:
    """Return the gradient at a layer's input."""
    gradients: list[mx.array] = []
    with hooked(model.layers[number], []) as module:
        for batch in call.batches():
            start = sum(g.shape[0] for g in gradients)

            def run(x: mx.array, batch: Call = batch) -> mx.array:
                return module.run(replace(batch, x=x))

            gradients += module.vjp(run, [batch.x], at_output[start : start + len(batch.x)])
    return mx.concatenate(gradients)


def _covariance(values: mx.array) -> mx.array:
    rows = values.reshape(-1, values.shape[-1]).astype(mx.float32)
    return rows.T @ rows / len(rows)


def _slope(model: StreamingModel, h: mx.array, x: mx.array) -> mx.array:
    """Return the factor by which the model multiplies the products of its head, usually 1."""
    rows = range(min(_ROWS, model.head_weight.shape[0]))
    weight = model.values(model.head_weight.name, rows.start, rows.stop).astype(mx.float32)
    logits, products = model.head_block(h[:1], rows), x[:1] @ weight.T
    return (logits * products).sum() / mx.square(products).sum()
