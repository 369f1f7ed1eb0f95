"""Sending a repo to the Hugging Face Hub, through the Hub's own client.

The client resumes: what an interrupted upload has stored is not sent again. Its token comes from
the standard places (`hf auth login`, HF_TOKEN) and stays with it.
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

from quantkit.artifacts.report import REPORT_FILE, Report
from quantkit.checkpoint.hub import is_repo_id
from quantkit.errors import HubError, HubUnreachableError, first_line
from quantkit.publish.card import CARD_FILE
from quantkit.publish.report import updated
from quantkit.storage.json_files import encoded

_SHARDS = "model*.safetensors"  # those of an earlier upload would be loaded by mlx-lm, too


@dataclass(frozen=True)
class Upload:
    """What is sent where: files with their sizes in bytes, largest first."""

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
    """What would be sent: the files that the report knows, the report and the card, nothing else.

    Report and card name the repo they are sent to. Raises HubError for what is no repo id.
    """
    _require_names(repo, revision)
    sizes = {shard.name: shard.size for shard in report.shards}
    sizes |= {file.name: file.size for file in report.files}
    if (out / CARD_FILE).is_file():  # one that was edited
        sizes[CARD_FILE] = (out / CARD_FILE).stat().st_size
    texts = updated(out, replace(report, repo=repo))
    sizes |= {name: len(encoded(text)) for name, text in texts.items()}
    about = f"{report.plan.bits_per_weight:.2f} bits per weight"
    made = f"quantkit {report.versions['quantkit']}"
    return Upload(
        repo,
        private,
        revision,
        message or f"{about}, made with {made}",
        tuple(sorted(sizes.items(), key=lambda item: (-item[1], item[0]))),
    )


def is_foreign(upload: Upload) -> bool:
    """Whether the Hub holds a model of that name that quantkit did not write.

    Raises HubError where there is no token, it may not write there, or a public repo would have to
    turn private.
    """
    api, repo = _api(), upload.repo
    with _clear_errors(repo):
        _require_right(api.whoami(), repo)
        if not api.repo_exists(repo):
            return False
        if upload.private and not api.repo_info(repo).private:
            raise HubError(f"{repo}: exists and is public. Make it private on its page, or leave.")
        names = _files(api, upload)
    model = any(name == "config.json" or name.endswith((".safetensors", ".gguf")) for name in names)
    return model and REPORT_FILE not in names


def send(out: Path, report: Report, upload: Upload) -> str:
    """Create the repo where there is none, and send; gives the commit's address.

    An interrupted one goes on when it is called again. Raises HubError; OUT itself is not touched.
    """
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, logging

    logging.set_verbosity_error()  # what goes wrong for good is raised, too
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
            there = [name for name in _files(api, upload) if "/" not in name and name not in sent]
            done = api.upload_folder(
                repo_id=upload.repo,
                folder_path=folder,
                revision=upload.revision,
                commit_message=upload.message,
                delete_patterns=[glob.escape(name) for name in there if fnmatchcase(name, _SHARDS)],
            )
            return str(done.commit_url)


def _gather(out: Path, report: Report, upload: Upload, folder: Path) -> None:
    """Links to all that is sent, and the texts that name the repo."""
    texts = updated(out, replace(report, repo=upload.repo))
    for name, _ in upload.files:
        (folder / name).parent.mkdir(exist_ok=True)
        if name in texts:
            (folder / name).write_bytes(encoded(texts[name]))
        else:
            (folder / name).symlink_to((out / name).resolve())


def _files(api: Any, upload: Upload) -> list[str]:
    """What the branch holds; a new one starts from main."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return list(api.list_repo_files(upload.repo, revision=upload.revision))
    except RevisionNotFoundError:
        return list(api.list_repo_files(upload.repo))


def _require_names(repo: str, revision: str | None) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as exc:
        raise HubError(f"{repo!r}: not a repo on the Hub ({first_line(exc)})") from exc
    if not is_repo_id(repo) or not repo.isascii():
        raise HubError(f"{repo!r}: not a repo on the Hub. Write it like user/name.")
    if revision is not None and not revision.strip():
        raise HubError("--revision: name a branch.")


def _require_right(me: Mapping[str, Any], repo: str) -> None:
    """Raises HubError for another one's repo, or a token that only reads."""
    owner = repo.partition("/")[0]
    mine = [me.get("name"), *(org.get("name") for org in me.get("orgs") or ())]
    if owner.lower() not in [str(name).lower() for name in mine]:
        raise HubError(
            f"{repo}: the token of {me.get('name')} may not write there. Log in as its owner."
        )
    token = (me.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise HubError("the token may only read. Make one that may write, then `hf auth login`.")


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="quantkit")


@contextmanager
def _clear_errors(repo: str, sending: bool = False) -> Iterator[None]:
    from huggingface_hub import errors

    again = "What has arrived is kept: run the same command to go on." if sending else "Try again."
    try:
        yield
    except errors.LocalTokenNotFoundError as exc:
        raise HubError("there is no Hub token. Run `hf auth login`, or set HF_TOKEN.") from exc
    except errors.RevisionNotFoundError as exc:
        raise HubError(f"{repo}: has no such revision.") from exc
    except errors.HfHubHTTPError as exc:
        status = exc.response.status_code if exc.response is not None else 500
        said = exc.server_message or first_line(exc)
        if status == 401:
            raise HubError(
                "the Hub does not take the token. Make one that may write, then `hf auth login`."
            ) from exc
        if status in (403, 404):
            raise HubError(f"{repo}: the token may not write there ({said}).") from exc
        if status < 500 and status != 429:
            raise HubError(f"{repo}: the Hub refuses this ({said}).") from exc
        raise HubUnreachableError(f"{repo}: the Hub failed ({said}). {again}") from exc
    except (errors.HTTPError, OSError, RuntimeError) as exc:
        cause = first_line(exc.__cause__ or exc)
        raise HubUnreachableError(f"{repo}: the Hub cannot be reached ({cause}). {again}") from exc
    except (LookupError, ValueError) as exc:
        raise HubError(f"{repo}: this does not work out with the Hub ({first_line(exc)}).") from exc
