"""Many prompts answered by one model, with mlx-lm's continuous batching.

On a CPU, where quantized products are slow, the weights are dequantized to float32 first.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.backend import mx, on_cpu
from quantkit.backend.cpu_functions import speed_up_mlx
from quantkit.checkpoint.stock import load_stock, repo_folder, require_repo
from quantkit.errors import OutputError, first_line
from quantkit.generation.memory import sequences_that_fit
from quantkit.streaming.experts import plain_switch_linear

_GPU_BATCH, _CPU_BATCH = 32, 16


@dataclass(frozen=True)
class Request:
    """A prompt of token ids; `among` are the tokens whose log-probabilities are wanted."""

    prompt: Sequence[int]
    max_tokens: int
    among: Sequence[int] = ()


@dataclass(frozen=True)
class Completion:
    """The answer to the prompt `number`, without the token that ended it.

    `truncated` if it reached its longest length. `log_probabilities` (among,) are those of the
    first token.
    """

    number: int
    tokens: list[int]
    truncated: bool
    log_probabilities: np.ndarray | None = None


class BatchModel:
    """A repo (a folder or a Hub id), loaded by stock mlx-lm, that answers prompts in batches."""

    def __init__(self, repo: str, *, trust_remote_code: bool = False) -> None:
        """Raises OutputError if mlx-lm does not load it."""
        require_repo(repo)
        self._model, self.tokenizer = load_stock(repo, trust_remote_code=trust_remote_code)
        self._folder = repo_folder(repo)
        self.arithmetic = "as stored"
        if on_cpu():
            speed_up_mlx()
            _dequantize(self._model)
            self.arithmetic = "dequantized to float32"

    def complete(
        self,
        requests: Sequence[Request],
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch: int | None = None,
    ) -> Iterator[Completion]:
        """Yield the answers as they end, `batch` prompts at a time. Raises OutputError.

        The default is 16 on a CPU; on a GPU 32, or as many as fit if all become as long as they
        may.
        """
        from mlx_lm.sample_utils import make_sampler

        size = batch or default_batch(self._folder, requests)
        mx.random.seed(seed)
        sampler = make_sampler(temp=temperature, top_p=top_p)
        yield from complete(self._model, self.tokenizer, requests, sampler, size)


def default_batch(folder: Path | None, requests: Sequence[Request]) -> int:
    """Return how many requests to a repo in `folder` are answered at once."""
    if on_cpu():
        return _CPU_BATCH
    longest = max((len(one.prompt) + one.max_tokens for one in requests), default=0)
    return sequences_that_fit(folder, longest, _GPU_BATCH)


def complete(
    model: Any, tokenizer: Any, requests: Sequence[Request], sampler: Any, size: int
) -> Iterator[Completion]:
    """Yield the answers of an mlx-lm model as they end, `size` prompts at a time.

    Raises OutputError.
    """
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(
        model,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        sampler=sampler,
        completion_batch_size=size,
        prefill_batch_size=min(size, 8),
    )
    try:
        numbers = generator.insert(
            [list(request.prompt) for request in requests],
            [request.max_tokens for request in requests],
        )
        places = {uid: place for place, uid in enumerate(numbers)}
        yield from _completions(generator, requests, places)
    except (RuntimeError, ValueError) as exc:
        raise OutputError(f"mlx-lm failed to generate ({first_line(exc)}).") from exc
    finally:
        generator.close()


def _completions(
    generator: Any, requests: Sequence[Request], places: dict[int, int]
) -> Iterator[Completion]:
    tokens: dict[int, list[int]] = {}
    first: dict[int, np.ndarray] = {}
    while responses := generator.next_generated():
        for response in responses:
            place = places[response.uid]
            if place not in tokens and (among := requests[place].among):
                # NumPy cannot read bfloat16.
                chosen = response.logprobs[mx.array(list(among))].astype(mx.float32)
                first[place] = np.array(chosen)
            answer = tokens.setdefault(place, [])
            if response.finish_reason != "stop":
                answer.append(int(response.token))
            if response.finish_reason is not None:
                cut = response.finish_reason == "length"
                yield Completion(place, answer, cut, first.get(place))


def _dequantize(model: Any) -> None:
    """Dequantize to float32, and let experts multiply all of their tokens at once."""
    from mlx.utils import tree_unflatten
    from mlx_lm.models.switch_layers import SwitchLinear
    from mlx_lm.utils import dequantize_model

    dequantize_model(model)
    model.set_dtype(mx.float32)
    plain = [
        (name, plain_switch_linear(module))
        for name, module in model.named_modules()
        if isinstance(module, SwitchLinear)
    ]
    model.update_modules(tree_unflatten(plain))


def single_tokens(tokenizer: Any, texts: Iterable[str]) -> list[int]:
    """Return the token of each text. Raises OutputError if one is more than a token."""
    ids = [list(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    if any(len(tokens) != 1 for tokens in ids):
        raise OutputError("the tokenizer splits a letter into several tokens.")
    return [tokens[0] for tokens in ids]
