"""Letting a repo speak, through stock mlx-lm."""

from collections.abc import Iterator
from pathlib import Path

from quantkit.backend import mx  # noqa: F401  (before mlx-lm: see backend)


def answer(repo: Path, question: str, max_tokens: int = 64) -> Iterator[str]:
    """The repo's greedy answer to a chat question, piece by piece."""
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(repo))
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    for step in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=max_tokens):
        yield step.text
        if step.finish_reason == "length":
            yield f" [cut after {max_tokens} tokens]"
