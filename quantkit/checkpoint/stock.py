"""Stock mlx-lm's own loading of a whole repo, with clear errors."""

from pathlib import Path
from typing import Any

from quantkit.backend import mx  # noqa: F401  (before mlx-lm: see backend)
from quantkit.errors import CalibrationError, OutputError, UntrustedCodeError

_MOST = 200  # characters of what went wrong


def load_stock(repo: str, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Return mlx-lm's model, with all its weights in memory, and its tokenizer.

    `repo` is a folder or a Hub id. Raises OutputError for what mlx-lm does not load, and
    UntrustedCodeError where the tokenizer wants to run code that is not trusted.
    """
    import mlx_lm

    options = {"trust_remote_code": trust_remote_code}
    try:
        model, tokenizer, *_ = mlx_lm.load(repo, tokenizer_config=options)
    except Exception as exc:  # whatever mlx-lm and transformers stumble over
        if _wants_code(exc):
            raise UntrustedCodeError(_refusal(repo)) from exc
        raise OutputError(f"{repo}: mlx-lm does not load it ({_said(exc)}).") from exc
    return model, tokenizer


def load_tokenizer(folder: Path, name: str, *, trust_remote_code: bool = False) -> Any:
    """Return mlx-lm's tokenizer of a model folder; `name` is what errors call it.

    Raises CalibrationError, and UntrustedCodeError where it wants to run code that is not trusted.
    """
    from mlx_lm import utils

    options = {"trust_remote_code": trust_remote_code}
    try:
        return utils.load_tokenizer(folder, options)
    except Exception as exc:  # whatever transformers and tokenizers raise on a file
        if _wants_code(exc):
            raise UntrustedCodeError(_refusal(name)) from exc
        raise CalibrationError(f"{name}: its tokenizer cannot be read ({_said(exc)}).") from exc


def _wants_code(exc: Exception) -> bool:
    """Return whether transformers refused because a repo brings Python code of its own."""
    return "trust_remote_code" in str(exc)


def _refusal(name: str) -> str:
    """Return the refusal to run the code of a repo."""
    return (
        f"{name}: its tokenizer comes with Python code of its own, which is not run unless you say "
        "so. Read that code, then add --trust-remote-code."
    )


def _said(exc: Exception) -> str:
    return f"{type(exc).__name__}: {' '.join(str(exc).split())[:_MOST]}"
