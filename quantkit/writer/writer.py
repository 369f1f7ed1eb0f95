"""Source and plan in, repo out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Protocol

from quantkit.artifacts.inventory import SourceFile, SourceId, with_hashes
from quantkit.artifacts.plan import Plan
from quantkit.artifacts.report import REPORT_FILE, Report, ShardRecord
from quantkit.backend import on_cpu
from quantkit.checkpoint.checkpoint import INDEX_FILE, hash_file
from quantkit.checkpoint.source import Source, file_hashes
from quantkit.errors import DamagedError, InputError, OutputError, SourceError, TierError
from quantkit.progress import Progress
from quantkit.staging import OutputDirectory, require_apart, require_free, source_marks, versions
from quantkit.storage.json_files import load_json, write_atomically
from quantkit.storage.paths import plain_path
from quantkit.storage.work_dir import Tensors
from quantkit.writer.config import companions, edit_config
from quantkit.writer.encode import unit_blocks
from quantkit.writer.shards import Shard, ShardWriter, lay_out

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Written:
    """What was written, for whoever describes it: the source with its files' hashes, the shards,
    and the other files that mlx-lm reads."""

    source: SourceId
    shards: tuple[ShardRecord, ...]
    files: tuple[SourceFile, ...]


Documents = Callable[[Written], Mapping[str, str]]
"""Makes the files that describe a repo (name -> text) once its shards are written."""


class Rounder(Protocol):
    """Gives the tensors of weights, asked for in the order of the model."""

    def __call__(self, name: str) -> Tensors | None:
        """None for a weight that is to be rounded to nearest."""
        ...

    def written(self, weights: Sequence[str]) -> None:
        """Those weights are in a finished shard."""
        ...


@dataclass(frozen=True)
class Rounding:
    """Calibrated rounding: `depends` names all that its results depend on, `make` gives the rounder
    that works in a folder, in which it needs `space` bytes."""

    depends: Mapping[str, str]
    make: Callable[[Path, Progress], Rounder]
    space: int


def rewrite(
    source: Source,
    plan: Plan,
    out: Path,
    documents: Documents,
    *,
    rounding: Rounding | None = None,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the repo that `plan` describes to `out`, which appears finished or not at all.

    Weights are rounded by `rounding`, to nearest where that is None. A killed run is taken up where
    it was by the next with the same source, plan, rounding and shard size; a repo that is there
    already, whole, is left alone unless `force`. `progress` is called with bytes of
    `plan.total_bytes`. Raises OutputError (nothing replaced), DamagedError (nothing left behind) or
    SourceError.
    """
    folder = source.checkpoint.path("")
    progress = progress or _silent
    out = plain_path(out)
    require_apart(out, folder)
    beside = companions(folder, source.inventory)
    shards = lay_out(source.inventory, plan, shard_bytes)
    depends = _depends(source, plan, shard_bytes) | dict(rounding.depends if rounding else {})
    staging = OutputDirectory(out, depends, force)
    if not force and is_current(out, source, plan, shards, beside):
        progress(plan.total_bytes, out.name)
        staging.tidy()
        return
    require_free(out, force)
    with staging:
        try:
            read, records = _write_shards(source, plan, shards, staging, rounding, progress)
        except (DamagedError, TierError):
            staging.discard()
            raise
        staging.write("config.json", edit_config(source.checkpoint.config, source.inventory, plan))
        staging.write(INDEX_FILE, _index(shards, plan))
        for name in beside:
            staging.copy(folder / name, name)
        names = sorted(["config.json", INDEX_FILE, *beside])
        files = tuple(_file_record(staging.repo, name) for name in names)
        for name, text in documents(Written(read, records, files)).items():
            write_atomically(staging.repo / name, text)
        staging.commit()


def is_current(
    out: Path, source: Source, plan: Plan, shards: tuple[Shard, ...], beside: Sequence[str]
) -> bool:
    """Whether `out` holds, unharmed, just what this rewrite would write: from the same values, in
    the same tiers and shards, by the same versions, and the same files `beside` them. Reads both
    source and repo to know."""
    if not (out / REPORT_FILE).is_file():
        return False
    try:
        report = Report.from_json(load_json(out / REPORT_FILE), REPORT_FILE)
    except InputError:
        return False
    same_shards = [(s.name, s.tensor_bytes) for s in report.shards] == [
        (shard.name, shard.tensor_bytes) for shard in shards
    ]
    held, planned = ((p.choices, p.kept) for p in (report.plan, plan))
    if not same_shards or held != planned or report.versions != versions():
        return False
    made, wanted = ((p.rounding, p.tuning_steps, p.calibration_texts) for p in (report.plan, plan))
    if made != wanted:
        return False
    if report.plan.source.structure != plan.source.structure:
        return False
    # A chat template that was mended, say.
    path = source.checkpoint.path
    if not all(_has_hash(path(name), report.sha256s.get(name)) for name in beside):
        return False
    if not all(_has_hash(out / name, sha256) for name, sha256 in report.sha256s.items()):
        return False
    return report.plan.source.files == with_hashes(plan.source, file_hashes(source)).files


def _has_hash(path: Path, sha256: str | None) -> bool:
    return path.is_file() and hash_file(path, path.name) == sha256


def _write_shards(
    source: Source,
    plan: Plan,
    shards: tuple[Shard, ...],
    staging: OutputDirectory,
    rounding: Rounding | None,
    progress: Progress,
) -> tuple[SourceId, tuple[ShardRecord, ...]]:
    """Gives the source with the hashes of its files, and the records of the shards."""
    missing = [shard for shard in shards if staging.finished(shard.name) is None]
    try:
        space = sum(shard.tensor_bytes for shard in missing)
        staging.require_space(space + (rounding.space if rounding and missing else 0))
    except OutputError:
        if len(missing) == len(shards):
            staging.discard()
        raise
    rounder = rounding.make(staging.work, progress) if rounding and missing else None
    records = []
    with _hashing(source) as hashes:
        for shard in shards:
            record = staging.finished(shard.name)
            if record is None:
                record = _write_shard(source, shard, rounder, staging, progress)
                staging.add(record)
            else:
                progress(shard.tensor_bytes, shard.name)
            if rounder:
                rounder.written([unit.name for unit in shard.units])
            records.append(record)
        return with_hashes(plan.source, hashes.result()), tuple(records)


@contextmanager
def _hashing(source: Source) -> Iterator["Future[dict[str, str]]"]:
    """The hashes of the source's shards, computed while they are read anyway."""
    stopped = Event()

    def go_on(_done: int, name: str) -> None:
        if stopped.is_set():
            raise SourceError(f"{name}: hashing was stopped.")

    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(file_hashes, source, go_on)
        finally:
            stopped.set()


def _write_shard(
    source: Source,
    shard: Shard,
    rounder: Rounder | None,
    staging: OutputDirectory,
    progress: Progress,
) -> ShardRecord:
    with ShardWriter(staging.repo, shard) as writer:
        for unit in shard.units:
            weight = source.weights.get(unit.name)
            rounded = rounder(unit.name) if rounder and unit.tier is not None else None
            for block in unit_blocks(source, unit, weight.storage if weight else None, rounded):
                writer.write(block)
                progress(block.nbytes, unit.name)
        return writer.finish()


def _file_record(folder: Path, name: str) -> SourceFile:
    path = folder / name
    return SourceFile(name, path.stat().st_size, hash_file(path, name))


def _index(shards: tuple[Shard, ...], plan: Plan) -> dict[str, object]:
    names = {
        spec.name: shard.name for shard in shards for unit in shard.units for spec in unit.tensors
    }
    metadata = {"total_size": plan.total_bytes, "total_parameters": plan.parameters}
    return {"metadata": metadata, "weight_map": dict(sorted(names.items()))}


def _depends(source: Source, plan: Plan, shard_bytes: int) -> dict[str, str]:
    """All that the bytes of the shards depend on, each under a name a person understands."""
    return {
        **source_marks(source),
        "plan": plan.tiers_sha256,
        "shard size": str(shard_bytes),
        "device": "cpu" if on_cpu() else "gpu",
        **{f"version of {package}": number for package, number in versions().items()},
    }


def _silent(_done: int, _name: str) -> None:
    pass
