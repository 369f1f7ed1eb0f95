"""What an embedding's errors cost: the covariance of the gradient at its output.

A row that is wrong by e moves the residual stream by e wherever its token stands, which costs
1/2 (g . e)^2 there, g = d log p(y) / d e for labels y drawn from the model: the expansion that
profiles are made by. So the mean of g g^T over the tokens of the text is to an embedding what the
Hessian of its inputs is to any other weight, every token counted as often as it comes. A table that
is the head as well is asked for its rows times x, too; both costs add up, and so do the two.
"""

from dataclasses import replace

import numpy as np

from quantkit.backend import free_memory, mx
from quantkit.model.head import label_gradients
from quantkit.model.replay import tapped
from quantkit.model.streamed import Call
from quantkit.model.streaming import StreamingModel
from quantkit.progress import Progress
from quantkit.work import Work

_SEED = 0


def embedding_hessian(
    model: StreamingModel, tokens: mx.array, work: Work, progress: Progress
) -> mx.array:
    """(hidden, hidden) in float32, from `tokens` (sequences, length): one pass forward and one
    back, a layer at a time. A killed one goes on at the layer it had reached."""
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
        work.drop(f"e-x-{number}.npy")
        free_memory()
    found = _covariance(g)
    if model.head_weight.role == "embedding":
        found = found + _covariance(model.head_input(h))
    mx.eval(found)
    for name in ("e-h.npy", *(f"e-g-{n}.npy" for n in range(layers + 1))):
        work.drop(name)
    return found


def _back(model: StreamingModel, number: int, call: Call, g: mx.array) -> mx.array:
    """The gradient at a layer's input."""
    found: list[mx.array] = []
    with tapped(model.layers[number], []) as module:
        for part in call.parts():
            start = sum(one.shape[0] for one in found)

            def run(x: mx.array, part: Call = part) -> mx.array:
                return module.run(replace(part, x=x))

            _, (at_input,) = mx.vjp(run, [part.x], [g[start : start + len(part.x)]])
            mx.eval(at_input)
            found.append(at_input)
    return mx.concatenate(found)


def _covariance(values: mx.array) -> mx.array:
    rows = values.reshape(-1, values.shape[-1]).astype(mx.float32)
    return rows.T @ rows / len(rows)
