"""Answers from mlx-lm's server: continuous batching, the prompt cache, a generation thread.

The only file that knows the internals of `mlx_lm.server`. Requests enter the queue of its
ResponseGenerator with an inbox of ours in the place of a queue, so that no thread waits for them.
"""

import argparse
import asyncio
import contextlib
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from quantkit.backend import mx  # noqa: F401  (before mlx-lm: see backend)
from quantkit.checkpoint.stock import load_stock, require_repo
from quantkit.errors import InputError, OutputError, first_line
from quantkit.generation.prompts import Prompt

_TOGETHER, _PREFILL_TOGETHER, _PREFILL_STEP = 32, 8, 2048
_SEQUENCES = 256  # in the prompt cache, whose bytes are bounded anyway


@dataclass(frozen=True)
class Sampling:
    """The sampling parameters of one answer."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Prefill:
    """How many tokens of a prompt are read. `cached` of them were read before."""

    read: int
    total: int
    cached: int


@dataclass(frozen=True)
class Step:
    """A generated token and, for a model without channels, its text by state.

    `segments` are pairs of a state (normal, reasoning, tool) and text. `finish` is stop or length.
    """

    token: int
    segments: Sequence[tuple[str, str]]
    finish: str | None


class Engine:
    """A repo, loaded whole, whose answers are generated in a thread."""

    def __init__(
        self, repo: str, *, cache_bytes: int | None = None, trust_remote_code: bool = False
    ) -> None:
        """Load the repo. Raises OutputError, and InputError under an mlx-lm that is too old."""
        require_repo(repo)
        server = _server_module()
        options = _options(repo, cache_bytes)
        self._provider = _provider(server, options, repo, trust_remote_code)
        cache = _prompt_cache(server, cache_bytes)
        self._server = server
        self._generator = _generator(server, self._provider, cache)
        self._provider.loaded.wait()
        if self._provider.failure is not None:
            self.close()  # or its thread keeps the process alive
            raise self._provider.failure
        self.tokenizer = self._provider.tokenizer
        self.vocabulary: int = max(self.tokenizer.get_vocab().values()) + 1
        args = getattr(self._provider.model, "args", None)
        self.vocabulary = min(self.vocabulary, getattr(args, "vocab_size", self.vocabulary))
        self.context: int = _context(self._provider.model)

    @property
    def is_alive(self) -> bool:
        """Whether the generation thread still works."""
        return bool(self._generator.generation_available())

    def close(self) -> None:
        """End the generation thread."""
        self._generator.stop_and_join()

    async def steps(
        self, prompt: Prompt, sampling: Sampling, *, by_state: bool
    ) -> AsyncIterator[Prefill | Step]:
        """Yield the progress of the prompt, then the tokens of its answer.

        `by_state` has their text by state, which models with channels do not need. An iterator
        that is closed early stops the generation. Raises OutputError.
        """
        alone = sampling.seed is not None or not self._provider.is_batchable
        inbox = _Inbox(asyncio.get_running_loop(), alone)
        request = self._server.CompletionRequest("text", prompt, [], None, None)
        self._generator.requests.put((inbox, request, self._arguments(sampling)))
        context: Any = None
        state: Any = None
        cached = 0
        try:
            while (item := await inbox.get()) is not None:
                if isinstance(item, Exception):
                    raise OutputError(f"mlx-lm failed to generate ({first_line(item)}).") from item
                if context is None:
                    context, cached = item, max(item.prompt_cache_count, 0)
                    state = context.text_sm.make_state(context.initial_state)
                    yield Prefill(cached, len(prompt.tokens), cached)
                elif isinstance(item, tuple):
                    # Served alone, a context comes before mlx-lm looks into the prompt cache.
                    cached = max(context.prompt_cache_count, 0)
                    yield Prefill(cached + item[0], len(prompt.tokens), cached)
                else:
                    segments: Sequence[tuple[str, str]] = ()
                    if by_state:
                        state, segments = self._segments(state, item)
                    yield Step(item.token, segments, item.finish_reason)
        finally:
            inbox.leave()

    def _segments(self, state: Any, response: Any) -> tuple[Any, list[tuple[str, str]]]:
        """Return the text of a response by state, as mlx-lm's server reads it."""
        machine = self._server.TextStateMachine
        if response.finish_reason == "stop":
            state, current = machine.discard(state)
            return state, [(current, "")]
        state, segments = machine.split(state, response.text)
        if response.finish_reason == "length":
            state, flushed, current = machine.flush(state)
            segments = [*segments, (current, flushed)]
        return state, segments

    def _arguments(self, sampling: Sampling) -> Any:
        server = self._server
        return server.GenerationArguments(
            model=server.ModelDescription("default_model", None, None),
            sampling=server.SamplingArguments(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                xtc_probability=0.0,
                xtc_threshold=0.0,
            ),
            logits=server.LogitsProcessorArguments(
                logit_bias=dict(sampling.logit_bias) if sampling.logit_bias else None,
                repetition_penalty=sampling.repetition_penalty,
                repetition_context_size=20,
                presence_penalty=sampling.presence_penalty,
                presence_context_size=_PREFILL_STEP,
                frequency_penalty=sampling.frequency_penalty,
                frequency_context_size=_PREFILL_STEP,
            ),
            stop_words=[],
            max_tokens=sampling.max_tokens,
            num_draft_tokens=0,
            logprobs=False,
            top_logprobs=0,
            seed=sampling.seed,
            chat_template_kwargs=None,
        )


class _Inbox:
    """Receives the answers of mlx-lm's generation thread for an event loop.

    The loop is woken only where it waits: every wake costs the generation thread time. A request
    that is served `alone` looks for its context's stop only after its prompt.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, alone: bool) -> None:
        self._alone = alone
        self._items: deque[Any] = deque()
        self._loop = loop
        self._waiting: asyncio.Future[None] | None = None
        self._left = False
        self._context: Any = None

    def put(self, item: Any) -> None:
        """Take an item from the generation thread, which an exception here stops if `alone`."""
        if self._left and self._alone and not (item is None or isinstance(item, Exception)):
            raise ConnectionAbortedError
        if self._context is None and hasattr(item, "stop"):
            self._context = item
            if self._left:
                item.stop()
        self._items.append(item)
        if self._waiting is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def get(self) -> Any:
        """Return the next item. The server ends if the generation thread does, see `app`."""
        while not self._items:
            self._waiting = self._loop.create_future()
            if not self._items:  # none came before the future was there to be seen
                await self._waiting
            self._waiting = None
        return self._items.popleft()

    def leave(self) -> None:
        """Stop the generation, even one that has not begun."""
        self._left = True
        if self._context is not None:
            self._context.stop()


def _server_module() -> Any:
    try:
        from mlx_lm import server

        server.ResponseGenerator, server.LRUPromptCache  # noqa: B018
        server.TextStateMachine.split  # noqa: B018  (missing in 0.32.0)
    except (ImportError, AttributeError) as exc:
        raise InputError(
            "`quantkit serve` needs mlx-lm 0.32.1 or newer, which needs Python 3.11 or newer."
        ) from exc
    return server


def _options(repo: str, cache_bytes: int | None) -> argparse.Namespace:
    """Return the options that mlx-lm's server reads."""
    return argparse.Namespace(
        model=repo,
        adapter_path=None,
        draft_model=None,
        pipeline=False,
        trust_remote_code=False,
        chat_template="",
        use_default_chat_template=False,
        decode_concurrency=_TOGETHER,
        prompt_concurrency=_PREFILL_TOGETHER,
        prefill_step_size=_PREFILL_STEP,
        prompt_cache_size=_SEQUENCES,
        prompt_cache_bytes=cache_bytes,
        kv_bits=None,
        kv_group_size=64,
        quantized_kv_start=0,
        chat_template_args={},
    )


def _provider(server: Any, options: argparse.Namespace, repo: str, trust_remote_code: bool) -> Any:
    class OneModel(server.ModelProvider):  # type: ignore[misc]
        """The one model of this server: nothing else is ever loaded."""

        def __init__(self) -> None:
            super().__init__(options)
            self.loaded = threading.Event()
            self.failure: Exception | None = None

        def load_default(self) -> None:
            try:
                self.model, self.tokenizer = load_stock(repo, trust_remote_code=trust_remote_code)
                self.model_key = (repo, None, None)
                caches = server.make_prompt_cache(self.model)
                self.is_batchable = all(hasattr(cache, "merge") for cache in caches)
            except Exception as exc:  # noqa: BLE001  (raised again by the engine)
                self.failure = exc
            self.loaded.set()

        def load(self, *_: Any) -> tuple[Any, Any]:
            return self.model, self.tokenizer

    return OneModel()


def _generator(server: Any, provider: Any, cache: Any) -> Any:
    class Generator(server.ResponseGenerator):  # type: ignore[misc]
        """Takes prompts that are token ids already."""

        def _generate(self) -> None:
            try:
                super()._generate()
            finally:
                provider.loaded.set()

        def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> tuple[Any, ...]:
            del args
            prompt: Prompt = request.prompt
            places = [0, *prompt.shared, len(prompt.tokens)]
            segments, types = [], []
            for number, (start, end) in enumerate(pairwise(places)):
                if end > start:
                    segments.append(prompt.tokens[start:end])
                    types.append("system" if number == 0 and prompt.shared else "user")
            types[-1] = "assistant"
            return list(prompt.tokens), segments, types, _state(tokenizer, prompt.tokens), None

        def _log_cache_stats(self) -> None:
            """Write nothing."""

    return Generator(provider, cache)


def _prompt_cache(server: Any, most: int | None) -> Any:
    class PromptCache(server.LRUPromptCache):  # type: ignore[misc]
        """Always leaves a token to read: without one, nothing can be generated."""

        def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
            cache, unread = super().fetch_nearest_cache(model, tokens[:-1])
            return cache, [*unread, tokens[-1]]

    return PromptCache(_SEQUENCES, most or sys.maxsize)


def _state(tokenizer: Any, tokens: list[int]) -> str:
    """Return whether an answer begins with reasoning, as after a prompt that opens it."""
    if not tokenizer.has_thinking:
        return "normal"
    opened, closed = tokenizer.rfind_think_start(tokens), tokenizer.rfind_think_end(tokens)
    initial = "reasoning" if opened > closed else "normal"
    return str(tokenizer.response_initial_state or initial)


def _context(model: Any) -> int:
    """Return the longest context of a model, in tokens."""
    settings = getattr(model, "args", None)
    text = getattr(settings, "text_config", None) or {}
    given = getattr(settings, "max_position_embeddings", None)
    return int(
        given or (text.get("max_position_embeddings") if isinstance(text, dict) else 0) or 131072
    )
