"""The output directory: OUT appears complete, or not at all.

The output grows in OUT.partial, which holds

    state.json   the input key, and the records of complete files
    repo/        the output so far
    work/        scratch from which an interrupted run resumes
    replaced/    the previous OUT, between two renames
    lock         held by the process at work

A finished output is renamed to OUT. A killed run leaves OUT.partial, from which the next run with
the same input key resumes.
"""

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from quantkit.errors import InputError, OutputError
from quantkit.storage.hashing import hash_file
from quantkit.storage.input_key import InputKey
from quantkit.storage.json_files import dump_json, load_json, write_atomically
from quantkit.storage.paths import PROFILE_FILE, REPORT_FILE, home_folder

_MARK = b"quantkit\n"
_SPARE = 64_000_000  # bytes left free for config, tokenizer, report
Record = dict[str, Any]
"""A complete file: `name`, `sha256`, and more fields of its writer."""


class OutputDirectory:
    """OUT.partial, locked while open. Use as a context manager; `task` names the run in errors."""

    def __init__(self, out: Path, key: InputKey, force: bool, task: str = "rewrite") -> None:
        self.out = out
        self.task = task
        self.folder = out.with_name(f"{out.name}.partial")
        self.repo = self.folder / "repo"
        self.work = self.folder / "work"
        self._replaced = self.folder / "replaced"
        self._state = self.folder / "state.json"
        self._key = key
        self._force = force
        self._records: dict[str, Record] = {}
        self._lock: int | None = None
        self.resumed = False
        self._new_parents: list[Path] = []

    def __enter__(self) -> "OutputDirectory":
        """Lock the directory. Raises OutputError if it is in use, or begun with other inputs."""
        with _clear_errors(self.folder):
            if self.folder.exists() and not self._is_ours():
                raise OutputError(
                    f"{self.folder}: exists, but quantkit did not make it. Move it away: the "
                    "unfinished output needs this place."
                )
            self._new_parents = [path for path in self.folder.parents if not path.exists()]
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
            self.discard()  # refused before any work: leave nothing behind
        self._unlock()

    def _is_empty(self) -> bool:
        return not self._records and not any(
            folder.is_dir() and any(folder.iterdir()) for folder in (self.repo, self.work)
        )

    def tidy(self) -> None:
        """Remove the leftovers of this very run, killed after the rename to OUT."""
        with _clear_errors(self.folder):
            if not self._is_ours() or not self._take_lock():
                return
            try:
                if not self._state.exists() or self._read_state()[0] is None:
                    self.discard()
            finally:
                self._unlock()

    def _is_ours(self) -> bool:
        lock = self.folder / "lock"
        if lock.is_file() and lock.read_bytes() == _MARK:
            return True
        # Killed before the mark was written, or after the other files were removed.
        return self.folder.is_dir() and {path.name for path in self.folder.iterdir()} <= {"lock"}

    def _take_lock(self) -> bool:
        path = self.folder / "lock"
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed the file meanwhile.
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
            if changed is None:
                self.repo.mkdir(exist_ok=True)
                self.work.mkdir(exist_ok=True)
                self.resumed = True
                self._records = {r["name"]: r for r in records if self._is_complete(r)}
                _clear(self.repo, keep=self._records.keys())
                return
            if not self._force:
                raise OutputError(
                    f"{self.folder}: holds an unfinished {self.task} with another {changed}. Run "
                    "with the same inputs to resume it, or with `force` to start over."
                )
        for folder in (self.repo, self.work):
            _remove(folder)
            folder.mkdir()
        self._save()

    def _read_state(self) -> tuple[str | None, list[Record]]:
        """Return (the first input that has changed, the records of complete files)."""
        saved = load_json(self._state, OutputError)
        try:
            key = dict(saved["input_key"])
            records = [{**record, "name": _plain_name(record)} for record in saved["files"]]
        except (KeyError, TypeError, ValueError) as exc:
            raise OutputError(
                f"{self._state}: damaged ({exc}). Remove its folder and run again."
            ) from exc
        return self._key.difference(key), records

    def _is_complete(self, record: Record) -> bool:
        path = self.repo / record["name"]
        return path.is_file() and hash_file(path, path.name) == record.get("sha256")

    def _save(self) -> None:
        state = {"input_key": dict(self._key.hashes), "files": list(self._records.values())}
        write_atomically(self._state, dump_json(state))

    def finished(self, name: str) -> Record | None:
        """Return the record of a file that an earlier run completed."""
        return self._records.get(name)

    def add(self, record: Record) -> None:
        """Record a complete file."""
        self._records[record["name"]] = record
        self._save()

    def require_space(self, work: int, files: int = 0) -> None:
        """Check that `files` more bytes of output and `work` bytes of scratch fit on the disk.

        Scratch of an interrupted run is there already, and counts. Raises OutputError.
        """
        there = sum(path.stat().st_size for path in self.work.rglob("*") if path.is_file())
        needed = files + max(0, work - there)
        free = shutil.disk_usage(self.folder).free
        if free < needed + _SPARE:
            raise OutputError(
                f"{self.out.parent}: {free / 1e9:.2f} GB free, {(needed + _SPARE) / 1e9:.2f} GB "
                "needed. Make room, or choose another output folder."
            )

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file into the repo."""
        write_atomically(self.repo / name, dump_json(value))

    def copy(self, path: Path, name: str) -> None:
        """Copy a file into the repo, under a name that may contain a folder."""
        target = self.repo / name
        with _clear_errors(target):
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
            with open(target, "rb") as file:
                os.fsync(file.fileno())

    def commit(self) -> None:
        """Rename the finished repo to OUT, replacing a previous one if `force` allows it.

        Raises OutputError if OUT has been created meanwhile; the finished repo stays in
        OUT.partial.
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
        """Remove OUT.partial, and the parents made for it if they are empty."""
        if self._is_ours():
            # The lock goes last: it marks the folder as ours. Files of other programs stay.
            for path in (self._state, *self.folder.glob(".state.json.*.tmp"), self._replaced):
                _remove(path)
            _remove(self.repo)
            _remove(self.work)
            (self.folder / "lock").unlink(missing_ok=True)
        with suppress(OSError):
            for path in (self.folder, *self._new_parents):
                path.rmdir()


def require_apart(out: Path, source: Path | None) -> None:
    """Check that replacing `out` or OUT.partial cannot delete a folder of the user.

    Raises OutputError if one of them is, contains, or lies in `source` (None while it is remote),
    or contains the working or home directory.
    """
    with _clear_errors(out):
        protected = [folder.resolve() for folder in (source, Path.cwd(), home_folder()) if folder]
        for target in (out.resolve(), Path(f"{out}.partial").resolve()):
            for folder in protected:
                if target == folder or target in folder.parents:
                    raise OutputError(
                        f"{target}: is or contains {folder}, which must not be replaced."
                    )
        if source is not None and source.resolve() in out.resolve().parents:
            raise OutputError(f"{out}: lies inside the source {source}. Choose another.")
        if out.exists() and (out.is_symlink() or out.is_mount()):
            raise OutputError(f"{out}: is a link or a mount point. Choose a folder inside of it.")


def require_free(out: Path, force: bool) -> None:
    """Check that `out` is missing, empty, or a folder that `force` replaces. Raises OutputError."""
    with _clear_errors(out):
        if out.is_symlink() and not out.exists():
            raise OutputError(f"{out}: is a broken link. Choose another output folder.")
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
        if not out.is_dir():
            raise OutputError(f"{out}: is a file. Choose another output folder.")
        if not force:
            content = "exists, but quantkit did not make it"
            for file, kind in ((REPORT_FILE, "quant"), (PROFILE_FILE, "profile")):
                if (out / file).exists():
                    content = f"holds another {kind}"
            raise OutputError(
                f"{out}: {content}. Choose another output folder, or replace it with `force`."
            )


def _plain_name(record: Mapping[str, Any]) -> str:
    name = record["name"]
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"{name!r} is not a plain file name")
    return name


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as exc:  # RuntimeError: a loop of links
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else exc
        raise OutputError(f"{path}: {reason}. Choose another output folder.") from exc


def _clear(folder: Path, keep: Collection[str]) -> None:
    """Remove the contents of `folder`, save for the names in `keep`."""
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
