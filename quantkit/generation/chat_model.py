"""Letting a repo speak, through stock mlx-lm."""

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
    """How to speak: at most `max_tokens`; of gpt-oss, with how much reasoning; drawn at a
    `temperature` (0: always the likeliest token) from the `top_p` likeliest, by a `seed`."""

    max_tokens: int = 1024
    effort: str | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class ChatModel:
    """A repo (a folder or a Hub id) loaded whole by stock mlx-lm."""

    def __init__(self, repo: str, *, trust_remote_code: bool = False) -> None:
        """Raises OutputError for what mlx-lm does not load."""
        require_repo(repo)
        self._model, self._tokenizer = load_stock(repo, trust_remote_code=trust_remote_code)
        self.truncated = False
        """Whether the last answer was cut after `max_tokens`."""

    def knows_effort(self) -> bool:
        """Whether the chat template asks how much to reason."""
        return "reasoning_effort" in str(getattr(self._tokenizer, "chat_template", None) or "")

    def answer(self, messages: Sequence[Message], sampling: SamplingParameters) -> Iterator[Delta]:
        """The answer to a chat, piece by piece, its channels told apart.

        Messages go to the chat template whole, with their thinking and tool calls. Raises
        InputError where the template refuses them.
        """
        from mlx_lm.sample_utils import make_sampler

        sampler = make_sampler(temp=sampling.temperature, top_p=sampling.top_p)
        mx.random.seed(sampling.seed)
        tokens = self._tokens(self._prompt(messages, sampling.effort), sampling.max_tokens, sampler)
        yield from Channels(self._tokenizer).deltas(tokens)

    def _prompt(self, messages: Sequence[Message], effort: str | None) -> list[int]:
        chat = normalize_messages(messages)
        if has_chat_template(self._tokenizer):
            variables = {"reasoning_effort": effort} if effort else {}
            text = render_chat(
                self._tokenizer, chat, add_generation_prompt=True, variables=variables
            )
        else:
            text = "\n".join(message["content"] for message in chat)
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise InputError("the prompt is not UTF-8 text.") from exc
        special = not has_chat_template(self._tokenizer)  # else the template has put them in
        prompt = list(self._tokenizer.encode(text, add_special_tokens=special))
        if not prompt:
            raise InputError("the prompt is empty. Ask something.")
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
            raise OutputError(f"mlx-lm cannot go on ({first_line(exc)}).") from exc


def require_repo(repo: str) -> None:
    """Raises OutputError for what can be neither a folder that holds a model nor a Hub id."""
    folder = Path(repo)
    if not folder.is_dir() and not is_repo_id(repo):
        raise OutputError(f"{repo}: no such folder, and no Hub id such as user/name.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise OutputError(f"{repo}: holds no model (no config.json).")
