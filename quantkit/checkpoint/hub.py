"""Checkpoints on the Hugging Face Hub: metadata without a download, and the download."""

import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantkit.artifacts.inventory import SourceFile
from quantkit.checkpoint.checkpoint import (
    CHAT_TEMPLATES,
    INDEX_FILE,
    Checkpoint,
    check_weight_map,
    choose_files,
    merge_headers,
    open_folder,
)
from quantkit.checkpoint.headers import StoredTensor, check_header
from quantkit.errors import HubError, HubUnreachableError, OutputError, SourceError, first_line
from quantkit.storage.json_files import load_json

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DOWNLOAD = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]
_DOWNLOAD += ["LICENSE*", "NOTICE*", "USAGE_POLICY*", "README.md"]
_READERS = 8  # headers fetched at a time


def is_repo_id(name: str) -> bool:
    """Return whether `name` has the form user/name."""
    return _REPO_ID.fullmatch(name) is not None


def open_hub(repo: str, revision: str | None) -> Checkpoint:
    """Open a Hub repo from its config and safetensors metadata (a few hundred kB).

    Raises HubError if the Hub does not answer or lacks the repo, SourceError for an unsound
    checkpoint.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    with _clear_errors(repo, revision):
        info = api.model_info(repo, revision=revision, files_metadata=True)
        commit = info.sha
        # By the requested name, so that the cache learns its commit.
        config_file = Path(hf_hub_download(repo, "config.json", revision=revision))
        config = load_json(config_file, SourceError)
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        index = None
        if INDEX_FILE in siblings:
            index_file = Path(hf_hub_download(repo, INDEX_FILE, revision=commit))
            index = check_weight_map(load_json(index_file, SourceError), repo)
        weight_map, names = choose_files({n for n in siblings if "/" not in n}, index, repo)
        files = tuple(_file(siblings.get(name), name) for name in names)

        def header(file: SourceFile) -> dict[str, StoredTensor]:
            read = api.parse_safetensors_file_metadata(repo, file.name, revision=commit)
            return _header(read.tensors, file)

        with ThreadPoolExecutor(_READERS) as pool:
            headers = dict(zip(names, pool.map(header, files), strict=True))
    return Checkpoint(repo, commit, None, config, merge_headers(headers, weight_map), files)


def cached_folder(repo: str, revision: str | None = None) -> Path | None:
    """Return the folder of a repo in the Hub's cache, which may lack files; None if not cached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as exc:
        # Newer clients miss all files that were left out on purpose, and name the folder.
        folder = getattr(exc, "snapshot_path", None)
        return None if folder is None else Path(folder)


def open_cached(repo: str, revision: str | None) -> Checkpoint | None:
    """Open a repo from the Hub's cache, None unless its shards were downloaded completely."""
    folder = cached_folder(repo, revision)
    try:
        return None if folder is None else open_folder(folder, repo, folder.name)
    except SourceError:
        return None


def download(checkpoint: Checkpoint) -> Path:
    """Download a repo's top-level model files into the Hub's cache, resuming.

    Raises HubError, or OutputError if the disk is too small.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import enable_progress_bars

    if checkpoint.folder is not None:
        return checkpoint.folder
    repo, revision = checkpoint.name, checkpoint.revision
    shards = [file.name for file in checkpoint.files]
    _require_space(checkpoint)
    enable_progress_bars()
    with _clear_errors(repo, revision):
        # Without folders: repos of gpt-oss also hold original/ and metal/, as large again.
        snapshot_download(
            repo, revision=revision, allow_patterns=[*_DOWNLOAD, *shards], ignore_patterns=["*/*"]
        )
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[CHAT_TEMPLATES]))


def fetch_file(repo: str, name: str) -> Path:
    """Download one file of a repo into the Hub's cache. Raises HubError."""
    from huggingface_hub import hf_hub_download

    with _clear_errors(repo, None):
        return Path(hf_hub_download(repo, name))


def _require_space(checkpoint: Checkpoint) -> None:
    """Check that the shards that the cache lacks fit on the disk. Raises OutputError."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE)
    blobs = cache / repo_folder_name(repo_id=checkpoint.name, repo_type="model") / "blobs"
    needed = sum(file.size - _downloaded(blobs, file) for file in checkpoint.files)
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"{cache}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed for the download. "
            "Make room, or set HF_HOME to another disk."
        )


def _downloaded(blobs: Path, file: SourceFile) -> int:
    """Return how many bytes of a shard are in the cache, be it of an interrupted download."""
    paths = (blobs / str(file.sha256), blobs / f"{file.sha256}.incomplete")
    return max((path.stat().st_size for path in paths if path.is_file()), default=0)


def _file(sibling: Any, name: str) -> SourceFile:
    if sibling is None or sibling.size is None:
        raise SourceError(f"{name}: named by the index, but missing from the repo.")
    return SourceFile(name, sibling.size, sibling.lfs.sha256 if sibling.lfs else None)


def _header(tensors: Any, file: SourceFile) -> dict[str, StoredTensor]:
    entries = {
        name: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": list(t.data_offsets)}
        for name, t in tensors.items()
    }
    # The metadata omits the length of the header: positions count from the start of the data.
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if end > file.size:
        raise SourceError(f"{file.name}: tensors end at byte {end} of a file of {file.size}.")
    return check_header(entries, file.name, 0, end)


@contextmanager
def _clear_errors(repo: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import errors

    at = f" at revision {revision}" if revision else ""
    try:
        yield
    except errors.GatedRepoError as exc:
        raise HubError(f"{repo}: access is gated. Ask for it on its page, then log in.") from exc
    except errors.RepositoryNotFoundError as exc:
        raise HubError(
            f"{repo}: neither a local folder nor a repo on the Hub that you may read. "
            "Check the name; for a private repo run: hf auth login"
        ) from exc
    except errors.RevisionNotFoundError as exc:
        raise HubError(f"{repo}{at}: the revision does not exist.") from exc
    except errors.RemoteEntryNotFoundError as exc:
        raise HubError(
            f"{repo}{at}: not a model repo: config.json or a shard of its index is missing."
        ) from exc
    except errors.HFValidationError as exc:
        raise HubError(f"{repo}: not a valid name of a Hub repo.") from exc
    except (errors.NotASafetensorsRepoError, errors.SafetensorsParsingError) as exc:
        raise SourceError(f"{repo}: has no readable safetensors at its top level.") from exc
    except (errors.HTTPError, OSError) as exc:
        raise HubUnreachableError(
            f"{repo}: the Hub cannot be reached ({first_line(exc)}). Check the connection, "
            "or give a local folder."
        ) from exc
