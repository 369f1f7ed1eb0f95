"""The folder in which a repo grows before it takes its name.

Beside OUT stands OUT.partial with

    state.json   what the rewrite depends on, and the shards that are complete
    repo/        the repo so far
    lock         held by the process at work

Only a finished repo is renamed to OUT; a killed run leaves OUT.partial, from which the next one
with the same inputs goes on.
"""

import fcntl
import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from quantkit.artifacts import REPORT_FILE, ShardRecord, dump_json, load_json, write_atomically
from quantkit.errors import OutputError
from quantkit.rewrite.shards import Shard, sync_folder

_SPARE = 64_000_000  # bytes left free for config, tokenizer, report


class Staging:
    """OUT.partial, locked while open. Use as a context manager."""

    def __init__(self, out: Path, depends: Mapping[str, str], force: bool) -> None:
        self.out = out
        self.folder = out.with_name(f"{out.name}.partial")
        self.repo = self.folder / "repo"
        self._replaced = self.folder / "replaced"
        self._depends = dict(depends)
        self._force = force
        self._records: dict[str, ShardRecord] = {}
        self._lock: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> "Staging":
        """Raises OutputError if it is in use, or holds an unfinished rewrite from other inputs."""
        if self.folder.exists() and not self._is_ours():
            raise OutputError(
                f"{self.folder}: exists and was not made by quantkit. Move it away: "
                "it stands where the unfinished output must go."
            )
        try:
            self._made = [path for path in self.folder.parents if not path.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT)
        except OSError as exc:
            raise OutputError(f"{self.folder}: cannot be made ({exc.strerror}).") from exc
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            self._unlock()
            raise OutputError(f"{self.folder}: another quantkit is writing there now.") from exc
        try:
            self._resume_or_start()
        except OutputError:
            self._unlock()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._unlock()

    def _is_ours(self) -> bool:
        if (self.folder / "lock").exists():
            return True
        return self.folder.is_dir() and not any(self.folder.iterdir())

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _resume_or_start(self) -> None:
        if self._replaced.exists() and not self.out.exists():
            self._replaced.replace(self.out)  # killed between the two renames of `commit`
        state = self.folder / "state.json"
        if state.exists():
            before, records = _read_state(state)
            changed = [key for key in self._depends if before.get(key) != self._depends[key]]
            if not changed:
                self._records = {r.name: r for r in records if self._is_whole(r)}
                _clear(self.repo, keep=self._records.keys())
                return
            if not self._force:
                raise OutputError(
                    f"{self.folder}: holds an unfinished rewrite with another {changed[0]}. "
                    "Run with the same inputs to go on, or with --force to start over."
                )
        shutil.rmtree(self.repo, ignore_errors=True)
        self.repo.mkdir()
        self._save()

    def _is_whole(self, record: ShardRecord) -> bool:
        path = self.repo / record.name
        return path.is_file() and path.stat().st_size == record.size

    def _save(self) -> None:
        shards = [asdict(record) for record in self._records.values()]
        state = {"depends": self._depends, "shards": shards}
        write_atomically(self.folder / "state.json", dump_json(state))

    def finished(self, shard: Shard) -> ShardRecord | None:
        """The record of a shard that an earlier run completed."""
        return self._records.get(shard.name)

    def add(self, record: ShardRecord) -> None:
        """Remember that a shard is complete."""
        self._records[record.name] = record
        self._save()

    def require_space(self, needed: int) -> None:
        """Raises OutputError unless `needed` more bytes fit on the disk."""
        free = shutil.disk_usage(self.folder).free
        if free < needed + _SPARE:
            raise OutputError(
                f"{self.out.parent}: {free / 1e9:.2f} GB free, {(needed + _SPARE) / 1e9:.2f} GB "
                "needed. Make room, or choose another output folder."
            )

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Put a JSON file into the repo."""
        write_atomically(self.repo / name, dump_json(value))

    def copy(self, path: Path) -> str:
        """Put a copy of a file into the repo; gives its name."""
        target = self.repo / path.name
        try:
            shutil.copyfile(path, target)
            with open(target, "rb") as file:
                os.fsync(file.fileno())
        except OSError as exc:
            raise OutputError(f"{path.name}: cannot be copied ({exc.strerror}).") from exc
        return path.name

    def commit(self) -> None:
        """Give the finished repo its name, in place of what `--force` allows to be replaced."""
        sync_folder(self.repo)
        if self.out.exists():
            self.out.replace(self._replaced)
        self.repo.replace(self.out)
        sync_folder(self.out.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the staging folder and all in it, and the parents made for it if empty."""
        if self._is_ours():
            _clear(self.folder, keep={"lock"})
            # The lock last: it is what tells that the folder is ours.
            (self.folder / "lock").unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()
        with suppress(OSError):
            for path in self._made:
                path.rmdir()


def _read_state(path: Path) -> tuple[dict[str, str], list[ShardRecord]]:
    saved = load_json(path, OutputError)
    try:
        return dict(saved["depends"]), [ShardRecord(**record) for record in saved["shards"]]
    except (KeyError, TypeError, ValueError) as exc:
        raise OutputError(f"{path}: damaged ({exc}). Remove its folder and run again.") from exc


def _clear(folder: Path, keep: Collection[str]) -> None:
    """Remove what is in `folder`, if it is there, but for the names to `keep`."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def require_apart(out: Path, source: Path) -> None:
    """Raises OutputError if `out` is, holds, or lies in the source, or holds the working or home
    directory: nothing may be put there, whatever is forced."""
    target = out.resolve()
    for kept in (source.resolve(), Path.cwd(), Path.home()):
        if target == kept or target in kept.parents:
            raise OutputError(f"{out}: is or contains {kept}, which must stay. Choose another.")
    if source.resolve() in target.parents:
        raise OutputError(f"{out}: lies inside the source {source}. Choose another.")


def require_free(out: Path, force: bool) -> None:
    """Raises OutputError unless `out` is missing, an empty folder, or a folder that `force` says
    to replace."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if out.is_dir() and force:
        return
    what = "holds another quant" if (out / REPORT_FILE).exists() else "exists and is not ours"
    if not out.is_dir():
        raise OutputError(f"{out}: is a file. Choose another output folder.")
    raise OutputError(f"{out}: {what}. Choose another output folder, or replace it with --force.")
