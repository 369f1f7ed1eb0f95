"""A chat model: a repo that answers, through stock mlx-lm."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.backend import mx
from quantkit.calibration.chat_template import (
    Message,
    has_chat_template,
    normalize_messages,
    render_chat,
)
from quantkit.checkpoint.hub import is_repo_id
from quantkit.checkpoint.stock import load_stock
from quantkit.errors import InputError, OutputError, first_line
from quantkit.generation.harmony import Channels, Delta

EFFORTS = ("low", "medium", "high")


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
        self._model, self._tokenizer = load_stock(repo, trust_remote_code=trust_remote_code)
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
        from mlx_lm.sample_utils import make_sampler

        sampler = make_sampler(temp=sampling.temperature, top_p=sampling.top_p)
        mx.random.seed(sampling.seed)
        tokens = self._tokens(self._prompt(messages, sampling.effort), sampling.max_tokens, sampler)
        yield from Channels(self._tokenizer).deltas(tokens)

    def answers(
        self,
        chats: Sequence[Sequence[Message]],
        sampling: SamplingParameters,
        tools: Sequence[Any] | None = None,
    ) -> list[list[Delta] | None]:
        """Return the answers to several chats at once; None for one that reached `max_tokens`.

        `tools` holds the tools of every chat. Raises InputError if the template refuses a chat.
        """
        import mlx_lm
        from mlx_lm.sample_utils import make_sampler

        mx.random.seed(sampling.seed)
        prompts = [
            self._prompt(chat, sampling.effort, offered)
            for chat, offered in zip(chats, tools or [None] * len(chats), strict=True)
        ]
        try:
            response = mlx_lm.batch_generate(
                self._model,
                self._tokenizer,
                prompts,
                max_tokens=sampling.max_tokens,
                sampler=make_sampler(temp=sampling.temperature, top_p=sampling.top_p),
            )
        except (RuntimeError, ValueError) as exc:
            raise OutputError(f"mlx-lm failed to generate ({first_line(exc)}).") from exc
        tokens = [self._tokenizer.encode(text, add_special_tokens=False) for text in response.texts]
        return [
            list(Channels(self._tokenizer).deltas(ids)) if len(ids) < sampling.max_tokens else None
            for ids in tokens
        ]

    def _prompt(
        self, messages: Sequence[Message], effort: str | None, tools: Any = None
    ) -> list[int]:
        chat = normalize_messages(messages)
        if has_chat_template(self._tokenizer):
            variables = {"reasoning_effort": effort} if effort else {}
            text = render_chat(
                self._tokenizer,
                chat,
                tools=tools,
                add_generation_prompt=True,
                variables=variables,
            )
        else:
            text = "\n".join(message["content"] for message in chat)
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise InputError("the prompt is not UTF-8 text.") from exc
        special = not has_chat_template(self._tokenizer)  # a template adds them itself
        prompt = list(self._tokenizer.encode(text, add_special_tokens=special))
        if not prompt:
            raise InputError("the prompt is empty. Ask a question.")
        return prompt

    def _tokens(self, prompt: list[int], max_tokens: int, sampler: Any) -> Iterator[int]:
        import mlx_lm

        steps = mlx_lm.stream_generate(
            self._model, self._tokenizer, prompt, max_tokens=max_tokens, sampler=sampler
        )
        self.truncated = False
        try:
            for step in steps:
                self.truncated = step.finish_reason == "length"
                if step.token not in self._tokenizer.eos_token_ids:
                    yield step.token
        except (RuntimeError, ValueError) as exc:
            raise OutputError(f"mlx-lm failed to generate ({first_line(exc)}).") from exc


def require_repo(repo: str) -> None:
    """Check that `repo` is a folder with a model, or a Hub id. Raises OutputError."""
    folder = Path(repo)
    if not folder.is_dir() and not is_repo_id(repo):
        raise OutputError(f"{repo}: neither a folder nor a Hub id (user/name).")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise OutputError(f"{repo}: not a model: config.json is missing.")
