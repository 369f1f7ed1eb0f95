"""A chat model: a repo that answers, through stock mlx-lm."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.backend import mx
from quantkit.calibration.chat_template import Message, normalize_messages
from quantkit.checkpoint.stock import load_stock, repo_folder, require_repo
from quantkit.errors import InputError, OutputError, first_line
from quantkit.generation.batches import Request, complete, default_batch
from quantkit.generation.harmony import Channels, Delta
from quantkit.generation.prompts import Prompt, Wishes, open_prompts

EFFORTS = ("low", "medium", "high")
_CHAT, _TURNS, _PREFILL = "chat", 2, 2048  # the key, number of turns in the cache, tokens a step


@dataclass(frozen=True)
class SamplingParameters:
    """Sampling parameters; `effort` is the reasoning effort of gpt-oss.

    A `temperature` of 0 takes the most probable token; `top_p` keeps the smallest set of tokens
    whose probability reaches it.
    """

    max_tokens: int = 1024
    effort: str | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class ChatModel:
    """A repo (a folder or a Hub id), loaded whole by stock mlx-lm."""

    def __init__(self, repo: str, *, trust_remote_code: bool = False) -> None:
        """Raises OutputError if mlx-lm does not load it."""
        require_repo(repo)
        from mlx_lm.models.cache import LRUPromptCache

        self._model, self._tokenizer = load_stock(repo, trust_remote_code=trust_remote_code)
        self._channels = Channels(self._tokenizer)
        self._folder = repo_folder(repo)
        self._prompts = open_prompts(self._tokenizer, self._folder)
        self._caches = LRUPromptCache(_TURNS)
        self.reread = 0
        """How many tokens of the messages of the last prompt had not been read before."""
        self.truncated = False
        """Whether the last answer reached `max_tokens`."""

    def knows_effort(self) -> bool:
        """Return whether the chat template reads a reasoning effort."""
        return "reasoning_effort" in str(getattr(self._tokenizer, "chat_template", None) or "")

    def answer(self, messages: Sequence[Message], sampling: SamplingParameters) -> Iterator[Delta]:
        """Yield the answer to a chat in deltas, by channel.

        Messages are passed to the chat template whole, with their thinking and tool calls. Raises
        InputError if the template refuses them.
        """
        prompt = self._prompt(messages, sampling.effort)
        yield from self._channels.deltas(self._tokens(prompt, sampling))

    def raw_answer(
        self, messages: Sequence[Message], sampling: SamplingParameters
    ) -> Iterator[str]:
        """Yield the answer to a chat as it is generated, with all of Harmony's marks."""
        tokens = self._tokens(self._prompt(messages, sampling.effort), sampling, ends=True)
        for token in tokens:
            yield str(self._tokenizer.decode([token]))

    def answers(
        self,
        chats: Sequence[Sequence[Message]],
        sampling: SamplingParameters,
        tools: Sequence[Any] | None = None,
    ) -> list[list[Delta] | None]:
        """Return the answers to several chats at once; None for one that reached `max_tokens`.

        `tools` holds the tools of every chat. Raises InputError if the template refuses a chat.
        """
        from mlx_lm.sample_utils import make_sampler

        requests = [
            Request(self._prompt(chat, sampling.effort, offered).tokens, sampling.max_tokens)
            for chat, offered in zip(chats, tools or [None] * len(chats), strict=True)
        ]
        mx.random.seed(sampling.seed)
        sampler = make_sampler(temp=sampling.temperature, top_p=sampling.top_p)
        answers: list[list[Delta] | None] = [None] * len(requests)
        size = default_batch(self._folder, requests)
        for done in complete(self._model, self._tokenizer, requests, sampler, size):
            if not done.truncated:
                answers[done.number] = list(self._channels.deltas(done.tokens))
        return answers

    def _prompt(self, messages: Sequence[Message], effort: str | None, tools: Any = None) -> Prompt:
        chat = normalize_messages(messages)
        try:
            "".join(message["content"] for message in chat).encode()
        except UnicodeEncodeError as exc:
            raise InputError("the prompt is not UTF-8 text.") from exc
        functions = [tool.get("function", tool) for tool in tools or ()]
        prompt = self._prompts.prompt(chat, Wishes(functions, effort))
        if not prompt.tokens:
            raise InputError("the prompt is empty. Ask a question.")
        return prompt

    def _tokens(
        self, prompt: Prompt, sampling: SamplingParameters, *, ends: bool = False
    ) -> Iterator[int]:
        """Yield generated tokens; with `ends`, the one that ends the answer, too."""
        import mlx_lm
        from mlx_lm.sample_utils import make_sampler

        mx.random.seed(sampling.seed)
        self.truncated = False
        try:
            cache, start = self._read(prompt)
            steps = mlx_lm.stream_generate(
                self._model,
                self._tokenizer,
                prompt.tokens[start:],
                max_tokens=sampling.max_tokens,
                sampler=make_sampler(temp=sampling.temperature, top_p=sampling.top_p),
                prompt_cache=cache,
            )
            for step in steps:
                self.truncated = step.finish_reason == "length"
                if ends or step.token not in self._tokenizer.eos_token_ids:
                    yield step.token
        except (RuntimeError, ValueError) as exc:
            raise OutputError(f"mlx-lm failed to generate ({first_line(exc)}).") from exc

    def _read(self, prompt: Prompt) -> tuple[Any, int]:
        """Return a cache that has read the beginning of a prompt, and how many tokens it has.

        The next turn begins with the messages of this one, so their cache is kept: the cache of
        sliding windows cannot be cut back from a longer text.
        """
        from mlx_lm.models.cache import make_prompt_cache

        end = max((length for length in prompt.shared if length < len(prompt.tokens)), default=0)
        shared = prompt.tokens[:end]
        cache, unread = self._caches.fetch_nearest_cache(_CHAT, shared) if end else (None, shared)
        cache = cache or make_prompt_cache(self._model)
        self.reread = len(unread)
        for start in range(0, len(unread), _PREFILL):
            self._model(mx.array(unread[start : start + _PREFILL])[None], cache=cache)
            mx.eval([layer.state for layer in cache])
        if end:
            self._caches.insert_cache(_CHAT, shared, copy.deepcopy(cache))
        return cache, end
