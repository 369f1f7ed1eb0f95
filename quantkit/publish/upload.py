"""Upload a repo to the Hugging Face Hub, through the Hub's own client.

The client resumes: files of an interrupted upload are not sent again. Its token comes from the
standard places (`hf auth login`, HF_TOKEN) and never leaves it.
"""

import glob
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from quantkit.artifacts.report import Report
from quantkit.checkpoint.hub import is_repo_id
from quantkit.errors import HubError, HubUnreachableError, first_line
from quantkit.publish.card import CARD_FILE
from quantkit.publish.record import updated
from quantkit.storage.json_files import encoded
from quantkit.storage.paths import REPORT_FILE

_SHARDS = "model*.safetensors"  # mlx-lm would also load the shards of an earlier upload


@dataclass(frozen=True)
class Upload:
    """An upload: its target, and its files with their sizes in bytes, largest first."""

    repo: str
    private: bool
    revision: str | None
    message: str
    files: tuple[tuple[str, int], ...]

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.files)


def plan_upload(
    out: Path,
    report: Report,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> Upload:
    """Plan an upload of the files in the report, the report and the card.

    Report and card name the target repo. Raises HubError for an invalid repo id.
    """
    _require_names(repo, revision)
    sizes = {shard.name: shard.size for shard in report.shards}
    sizes |= {file.name: file.size for file in report.files}
    if (out / CARD_FILE).is_file():  # edited by hand
        sizes[CARD_FILE] = (out / CARD_FILE).stat().st_size
    texts = updated(out, replace(report, repo=repo))
    sizes |= {name: len(encoded(text)) for name, text in texts.items()}
    size = f"{report.plan.bits_per_weight:.2f} bits per weight"
    maker = f"quantkit {report.versions['quantkit']}"
    return Upload(
        repo,
        private,
        revision,
        message or f"{size}, made with {maker}",
        tuple(sorted(sizes.items(), key=lambda item: (-item[1], item[0]))),
    )


def is_foreign(upload: Upload) -> bool:
    """Return whether the Hub holds a model of that name that quantkit did not write.

    Raises HubError if there is no token, if it may not write there, or if a public repo would have
    to become private.
    """
    api, repo = _api(), upload.repo
    with _clear_errors(repo):
        _require_right(api.whoami(), repo)
        if not api.repo_exists(repo):
            return False
        if upload.private and not api.repo_info(repo).private:
            raise HubError(
                f"{repo}: exists and is public. Make it private on its page, or leave "
                "out `private`."
            )
        names = _files(api, upload)
    model = any(name == "config.json" or name.endswith((".safetensors", ".gguf")) for name in names)
    return model and REPORT_FILE not in names


def send(out: Path, report: Report, upload: Upload) -> str:
    """Create the repo if necessary, upload, and return the commit's address.

    An interrupted upload is resumed by the next call. Raises HubError; `out` itself stays as it is.
    """
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, logging

    logging.set_verbosity_error()  # failures raise exceptions
    (enable_progress_bars if sys.stderr.isatty() else disable_progress_bars)()
    api = _api()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _gather(out, report, upload, folder)
        with _clear_errors(upload.repo, sending=True):
            api.create_repo(upload.repo, private=upload.private or None, exist_ok=True)
            if upload.revision is not None:
                api.create_branch(upload.repo, branch=upload.revision, exist_ok=True)
            sent = {name for name, _ in upload.files}
            stale = [name for name in _files(api, upload) if "/" not in name and name not in sent]
            done = api.upload_folder(
                repo_id=upload.repo,
                folder_path=folder,
                revision=upload.revision,
                commit_message=upload.message,
                delete_patterns=[glob.escape(name) for name in stale if fnmatchcase(name, _SHARDS)],
            )
            return str(done.commit_url)


def _gather(out: Path, report: Report, upload: Upload, folder: Path) -> None:
    """Link all files to send, and write the texts that name the repo."""
    texts = updated(out, replace(report, repo=upload.repo))
    for name, _ in upload.files:
        (folder / name).parent.mkdir(exist_ok=True)
        if name in texts:
            (folder / name).write_bytes(encoded(texts[name]))
        else:
            (folder / name).symlink_to((out / name).resolve())


def _files(api: Any, upload: Upload) -> list[str]:
    """Return the files of the branch; a new branch starts from main."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return list(api.list_repo_files(upload.repo, revision=upload.revision))
    except RevisionNotFoundError:
        return list(api.list_repo_files(upload.repo))


def _require_names(repo: str, revision: str | None) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not is_repo_id(repo) or not repo.isascii():
        raise HubError(f"{repo!r}: not a repo on the Hub. Write it like user/name.")
    try:
        validate_repo_id(repo)
    except HFValidationError as exc:
        raise HubError(f"{repo!r}: not a repo on the Hub ({first_line(exc)})") from exc
    if revision is not None and not revision.strip():
        raise HubError("`revision`: name a branch.")


def _require_right(me: Mapping[str, Any], repo: str) -> None:
    """Check that the token may write to the repo. Raises HubError."""
    owner = repo.partition("/")[0]
    mine = [me.get("name"), *(org.get("name") for org in me.get("orgs") or ())]
    if owner.lower() not in [str(name).lower() for name in mine]:
        raise HubError(
            f"{repo}: the token of {me.get('name')} may not write there. Log in as its owner."
        )
    token = (me.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise HubError(
            "the token may only read. Create a token with write access, then `hf auth login`."
        )


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="quantkit")


@contextmanager
def _clear_errors(repo: str, sending: bool = False) -> Iterator[None]:
    from huggingface_hub import errors

    again = "Uploaded files are kept: run the same command to resume." if sending else "Try again."
    try:
        yield
    except errors.LocalTokenNotFoundError as exc:
        raise HubError("the Hub token is missing. Run `hf auth login`, or set HF_TOKEN.") from exc
    except errors.RevisionNotFoundError as exc:
        raise HubError(f"{repo}: the revision does not exist.") from exc
    except errors.HfHubHTTPError as exc:
        status = exc.response.status_code if exc.response is not None else 500
        reason = exc.server_message or first_line(exc)
        if status == 401:
            raise HubError(
                "the Hub rejects the token. Create a token with write access, then `hf auth login`."
            ) from exc
        if status in (403, 404):
            raise HubError(f"{repo}: the token may not write there ({reason}).") from exc
        if status < 500 and status != 429:
            raise HubError(f"{repo}: the Hub refuses the upload ({reason}).") from exc
        raise HubUnreachableError(f"{repo}: the Hub failed ({reason}). {again}") from exc
    except (errors.HTTPError, OSError, RuntimeError) as exc:
        cause = first_line(exc.__cause__ or exc)
        raise HubUnreachableError(f"{repo}: the Hub cannot be reached ({cause}). {again}") from exc
    except (LookupError, ValueError) as exc:
        raise HubError(f"{repo}: the Hub client failed ({first_line(exc)}).") from exc
