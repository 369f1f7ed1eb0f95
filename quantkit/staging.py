"""The folder in which an output grows before it takes its name.

Beside OUT stands OUT.partial with

    state.json   what the output depends on, and the shards that are complete
    repo/        the output so far
    work/        what an interrupted run can go on from, and the output does without
    replaced/    what stood at OUT, for the moment between two renames
    lock         held by the process at work

Only a finished output is renamed to OUT; a killed run leaves OUT.partial, from which the next one
with the same inputs goes on.
"""

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from quantkit.artifacts.profile import PROFILE_FILE
from quantkit.artifacts.report import REPORT_FILE, ShardRecord, shard_record
from quantkit.checkpoint.checkpoint import hash_file
from quantkit.checkpoint.source import Source
from quantkit.errors import InputError, OutputError
from quantkit.storage.json_files import dump_json, load_json, write_atomically
from quantkit.storage.paths import home_folder

_MARK = b"quantkit\n"
_SPARE = 64_000_000  # bytes left free for config, tokenizer, report


class OutputDirectory:
    """OUT.partial, locked while open. Use as a context manager."""

    def __init__(
        self, out: Path, depends: Mapping[str, str], force: bool, what: str = "rewrite"
    ) -> None:
        self.out = out
        self.what = what
        self.folder = out.with_name(f"{out.name}.partial")
        self.repo = self.folder / "repo"
        self.work = self.folder / "work"
        self._replaced = self.folder / "replaced"
        self._state = self.folder / "state.json"
        self._depends = dict(depends)
        self._force = force
        self._records: dict[str, ShardRecord] = {}
        self._lock: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> "OutputDirectory":
        """Raises OutputError if it is in use, or holds an unfinished rewrite from other inputs."""
        with _clear_errors(self.folder):
            if self.folder.exists() and not self._is_ours():
                raise OutputError(
                    f"{self.folder}: exists and was not made by quantkit. Move it away: "
                    "it stands where the unfinished output must go."
                )
            self._made = [path for path in self.folder.parents if not path.exists()]
            new = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._take_lock():
                raise OutputError(f"{self.folder}: another quantkit is writing there now.")
            try:
                self._resume_or_start()
            except (OSError, OutputError):
                if new:
                    self.discard()
                self._unlock()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if isinstance(exc, InputError) and self._is_empty():
            self.discard()  # refused before anything was done: nothing is left
        self._unlock()

    def _is_empty(self) -> bool:
        return not self._records and not any(
            folder.is_dir() and any(folder.iterdir()) for folder in (self.repo, self.work)
        )

    def tidy(self) -> None:
        """Remove what is left of this very rewrite, killed after its repo had taken its name."""
        with _clear_errors(self.folder):
            if not self._is_ours() or not self._take_lock():
                return
            try:
                if not self._state.exists() or not self._read_state()[0]:
                    self.discard()
            finally:
                self._unlock()

    def _is_ours(self) -> bool:
        lock = self.folder / "lock"
        if lock.is_file() and lock.read_bytes() == _MARK:
            return True
        # Killed before the mark was set, or after all else was removed.
        return self.folder.is_dir() and {path.name for path in self.folder.iterdir()} <= {"lock"}

    def _take_lock(self) -> bool:
        path = self.folder / "lock"
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may just have removed it: then this is no lock any more.
            if os.path.samestat(os.fstat(self._lock), path.stat()):
                os.pwrite(self._lock, _MARK, 0)
                return True
        except OSError:
            pass
        self._unlock()
        return False

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _resume_or_start(self) -> None:
        if self._replaced.exists():  # killed around the two renames of `commit`
            if self.out.exists():
                _remove(self._replaced)
            else:
                self._replaced.replace(self.out)
        if self._state.exists():
            changed, records = self._read_state()
            if not changed:
                self.repo.mkdir(exist_ok=True)
                self.work.mkdir(exist_ok=True)
                self._records = {r.name: r for r in records if self._is_whole(r)}
                _clear(self.repo, keep=self._records.keys())
                return
            if not self._force:
                raise OutputError(
                    f"{self.folder}: holds an unfinished {self.what} with another {changed[0]}. "
                    "Run with the same inputs to go on, or with --force to start over."
                )
        for folder in (self.repo, self.work):
            _remove(folder)
            folder.mkdir()
        self._save()

    def _read_state(self) -> tuple[list[str], list[ShardRecord]]:
        """(the inputs that have changed since, the shards that were complete)"""
        saved = load_json(self._state, OutputError)
        try:
            before = dict(saved["depends"])
            records = [shard_record(record) for record in saved["shards"]]
        except (KeyError, TypeError, ValueError) as exc:
            raise OutputError(
                f"{self._state}: damaged ({exc}). Remove its folder and run again."
            ) from exc
        return [k for k in self._depends if before.get(k) != self._depends[k]], records

    def _is_whole(self, record: ShardRecord) -> bool:
        path = self.repo / record.name
        return path.is_file() and hash_file(path, path.name) == record.sha256

    def _save(self) -> None:
        shards = [asdict(record) for record in self._records.values()]
        write_atomically(self._state, dump_json({"depends": self._depends, "shards": shards}))

    def finished(self, shard: str) -> ShardRecord | None:
        """The record of a shard that an earlier run completed."""
        return self._records.get(shard)

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

    def copy(self, path: Path, name: str) -> None:
        """Put a copy of a file into the repo, under a name that may lie in a folder."""
        target = self.repo / name
        with _clear_errors(target):
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
            with open(target, "rb") as file:
                os.fsync(file.fileno())

    def commit(self) -> None:
        """Give the finished repo its name, in place of what `--force` allows to be replaced.

        Raises OutputError, the finished repo kept in the staging folder, if something has come to
        stand there meanwhile.
        """
        require_free(self.out, self._force)
        with _clear_errors(self.out):
            sync_folder(self.repo)
            if self.out.exists():
                self.out.replace(self._replaced)
            self.repo.replace(self.out)
            sync_folder(self.out.parent)
            self.discard()

    def discard(self) -> None:
        """Remove the staging folder and all in it, and the parents made for it if empty."""
        if self._is_ours():
            # The lock last: it is what tells that the folder is ours. Files of others stay.
            for path in (self._state, *self.folder.glob(".state.json.*.tmp"), self._replaced):
                _remove(path)
            _remove(self.repo)
            _remove(self.work)
            (self.folder / "lock").unlink(missing_ok=True)
        with suppress(OSError):
            for path in (self.folder, *self._made):
                path.rmdir()


def versions() -> dict[str, str]:
    """The versions on which what is written depends."""
    return {package: version(package) for package in ("quantkit", "mlx", "mlx-lm")}


def source_marks(source: Source) -> dict[str, str]:
    """What tells whether a source has changed, under names a person understands."""
    files = {
        f"source file {file.name}": source.checkpoint.fingerprint(file)
        for file in source.checkpoint.files
    }
    structure = source.inventory.source.structure
    return {"source structure": structure, "float type": source.floats, **files}


def require_apart(out: Path, source: Path | None) -> None:
    """Raises OutputError if `out` is, holds, or lies in the source, or holds the working or home
    directory: nothing may be put there, whatever is forced; nor in the staging folder. `source` is
    None while it is remote."""
    with _clear_errors(out):
        kept = [folder.resolve() for folder in (source, Path.cwd(), home_folder()) if folder]
        for target in (out.resolve(), Path(f"{out}.partial").resolve()):
            for folder in kept:
                if target == folder or target in folder.parents:
                    raise OutputError(f"{target}: is or contains {folder}, which must stay.")
        if source is not None and source.resolve() in out.resolve().parents:
            raise OutputError(f"{out}: lies inside the source {source}. Choose another.")
        if out.exists() and (out.is_symlink() or out.is_mount()):
            raise OutputError(f"{out}: is a link or a mount point. Choose a folder inside of it.")


def require_free(out: Path, force: bool) -> None:
    """Raises OutputError unless `out` is missing, an empty folder, or a folder that `force` says
    to replace."""
    with _clear_errors(out):
        if out.is_symlink() and not out.exists():
            raise OutputError(f"{out}: is a broken link. Choose another output folder.")
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
        if not out.is_dir():
            raise OutputError(f"{out}: is a file. Choose another output folder.")
        if not force:
            what = "exists and is not ours"
            for file, kind in ((REPORT_FILE, "quant"), (PROFILE_FILE, "profile")):
                if (out / file).exists():
                    what = f"holds another {kind}"
            raise OutputError(
                f"{out}: {what}. Choose another output folder, or replace it with --force."
            )


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as exc:  # RuntimeError: a loop of links
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else exc
        raise OutputError(f"{path}: {reason}. Choose another output folder.") from exc


def _clear(folder: Path, keep: Collection[str]) -> None:
    """Remove what is in `folder`, if it is there, but for the names to `keep`."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in keep:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
