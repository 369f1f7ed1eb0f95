"""Load a whole repo with stock mlx-lm, with clear errors."""

from pathlib import Path
from typing import Any

from quantkit.backend import mx  # noqa: F401  (before mlx-lm: see backend)
from quantkit.checkpoint.hub import cached_folder, is_repo_id
from quantkit.errors import CalibrationError, OutputError, UntrustedCodeError

_MOST = 200  # characters of a foreign message


def require_repo(repo: str) -> None:
    """Check that `repo` is a folder with a model, or a Hub id. Raises OutputError."""
    folder = Path(repo)
    if not folder.is_dir() and not is_repo_id(repo):
        raise OutputError(f"{repo}: neither a folder nor a Hub id (user/name).")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise OutputError(f"{repo}: not a model: config.json is missing.")


def repo_folder(repo: str) -> Path | None:
    """Return the folder of a repo that has been loaded, from the Hub's cache if need be."""
    if Path(repo).is_dir():
        return Path(repo)
    try:
        return cached_folder(repo)
    except Exception:  # noqa: BLE001  (huggingface_hub raises anything)
        return None


def load_stock(repo: str, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Return mlx-lm's model, with all its weights in memory, and its tokenizer.

    `repo` is a folder or a Hub id. Raises OutputError if mlx-lm fails to load it,
    UntrustedCodeError if the tokenizer needs to run untrusted code.
    """
    import mlx_lm

    options = {"trust_remote_code": trust_remote_code}
    try:
        model, tokenizer, *_ = mlx_lm.load(repo, tokenizer_config=options)
    except Exception as exc:  # mlx-lm and transformers raise anything
        if _wants_code(exc):
            raise UntrustedCodeError(_refusal(repo)) from exc
        raise OutputError(f"{repo}: mlx-lm does not load it ({_said(exc)}).") from exc
    return model, tokenizer


def load_tokenizer(folder: Path, name: str, *, trust_remote_code: bool = False) -> Any:
    """Return mlx-lm's tokenizer of a model folder, which errors call `name`.

    Raises CalibrationError, or UntrustedCodeError if it needs to run untrusted code.
    """
    from mlx_lm import utils

    options = {"trust_remote_code": trust_remote_code}
    try:
        return utils.load_tokenizer(folder, options)
    except Exception as exc:  # transformers and tokenizers raise anything
        if _wants_code(exc):
            raise UntrustedCodeError(_refusal(name)) from exc
        raise CalibrationError(f"{name}: its tokenizer cannot be read ({_said(exc)}).") from exc


def _wants_code(exc: Exception) -> bool:
    """Return whether transformers refused Python code of the repo."""
    return "trust_remote_code" in str(exc)


def _refusal(name: str) -> str:
    """Return the refusal to run the code of a repo."""
    return (
        f"{name}: its tokenizer needs to run Python code of the repo. Read that code, then set "
        "`trust_remote_code`."
    )


def _said(exc: Exception) -> str:
    return f"{type(exc).__name__}: {' '.join(str(exc).split())[:_MOST]}"
