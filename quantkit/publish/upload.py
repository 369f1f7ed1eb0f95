"""Sending a repo to the Hugging Face Hub, through the Hub's own client.

The client resumes: what an interrupted upload has stored is not sent again. Its token comes from
the standard places (`hf auth login`, HF_TOKEN) and stays with it.
"""

import glob
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantkit.artifacts.report import REPORT_FILE, Report
from quantkit.errors import HubError, HubUnreachableError, first_line
from quantkit.publish.card import CARD_FILE
from quantkit.publish.report import record, updated
from quantkit.source.hub import is_repo_id

_REPLACED = "model*.safetensors"  # those of an earlier upload would be loaded by mlx-lm, too


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
    if not is_repo_id(repo):
        raise HubError(f"{repo}: not a repo on the Hub. Write it like user/name.")
    texts = updated(out, replace(report, repo=repo))
    sizes = {name: (out / name).stat().st_size for name in report.sha256s}
    if (out / CARD_FILE).exists():  # one that was edited
        sizes[CARD_FILE] = (out / CARD_FILE).stat().st_size
    sizes |= {name: len(text.encode()) for name, text in texts.items()}
    about = f"{report.plan.bits_per_weight:.2f} bits per weight"
    made = f"quantkit {report.versions['quantkit']}"
    return Upload(
        repo,
        private,
        revision,
        message or f"{about}, made with {made}",
        tuple(sorted(sizes.items(), key=lambda item: (-item[1], item[0]))),
    )


def is_foreign(repo: str) -> bool:
    """Whether the Hub holds a model of that name that quantkit did not write. Raises HubError where
    there is no token, or no right to write there."""
    api = _api()
    with _clear_errors(repo):
        api.whoami()
        if not api.repo_exists(repo):
            return False
        names = api.list_repo_files(repo)
    model = any(name == "config.json" or name.endswith((".safetensors", ".gguf")) for name in names)
    return model and REPORT_FILE not in names


def send(out: Path, report: Report, upload: Upload) -> str:
    """Create the repo where there is none, and send; gives the commit's address.

    An interrupted one goes on when it is called again. Raises HubError, nothing being lost.
    """
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, logging

    logging.set_verbosity_error()  # what goes wrong for good is raised, too
    api = _api()
    with _clear_errors(upload.repo):
        api.create_repo(upload.repo, private=upload.private or None, exist_ok=True)
        if upload.revision is not None:
            api.create_branch(upload.repo, branch=upload.revision, exist_ok=True)
    record(out, replace(report, repo=upload.repo))
    (enable_progress_bars if sys.stderr.isatty() else disable_progress_bars)()
    with _clear_errors(upload.repo):
        done = api.upload_folder(
            repo_id=upload.repo,
            folder_path=out,
            revision=upload.revision,
            commit_message=upload.message,
            allow_patterns=[glob.escape(name) for name, _ in upload.files],
            delete_patterns=[_REPLACED],
        )
    return str(done.commit_url)


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="quantkit")


@contextmanager
def _clear_errors(repo: str) -> Iterator[None]:
    from huggingface_hub import errors

    again = "What has arrived is kept: run the same command to go on."
    try:
        yield
    except errors.LocalTokenNotFoundError as exc:
        raise HubError("there is no Hub token. Run `hf auth login`, or set HF_TOKEN.") from exc
    except errors.RevisionNotFoundError as exc:
        raise HubError(f"{repo}: has no such revision.") from exc
    except errors.HFValidationError as exc:
        raise HubError(f"{repo}: not a name that the Hub gives to a repo.") from exc
    except errors.HfHubHTTPError as exc:
        status = exc.response.status_code if exc.response is not None else None
        if status == 401:
            raise HubError(
                "the Hub does not take the token. Make one that may write, then `hf auth login`."
            ) from exc
        if status in (403, 404):
            raise HubError(
                f"{repo}: the token may not write there. Log in as its owner, or make a token "
                "with the right to write."
            ) from exc
        raise HubUnreachableError(f"{repo}: the Hub failed ({first_line(exc)}). {again}") from exc
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as exc:
        cause = exc.__cause__ or exc
        raise HubUnreachableError(
            f"{repo}: the Hub cannot be reached ({first_line(cause)}). {again}"
        ) from exc
