"""Write a plan's repo: source and plan in, shards and their companions out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Protocol

from quantkit.artifacts.inventory import SourceFile, SourceId, with_hashes
from quantkit.artifacts.plan import Plan
from quantkit.artifacts.report import Report, ShardRecord, shard_record
from quantkit.backend import on_cpu
from quantkit.checkpoint.checkpoint import INDEX_FILE
from quantkit.checkpoint.provenance import input_key, versions
from quantkit.checkpoint.source import Source, file_hashes
from quantkit.errors import DamagedError, InputError, SourceError, TierError
from quantkit.progress import Progress, Stage
from quantkit.storage.hashing import hash_file
from quantkit.storage.input_key import InputKey
from quantkit.storage.json_files import load_json, write_atomically
from quantkit.storage.output_dir import OutputDirectory, require_apart, require_free
from quantkit.storage.paths import REPORT_FILE, plain_path
from quantkit.storage.work_dir import Tensors
from quantkit.writer.config import companions, edit_config
from quantkit.writer.encode import unit_blocks
from quantkit.writer.shards import Shard, ShardWriter, lay_out

SHARD_BYTES = 5_000_000_000


class Quantization(Protocol):
    """Calibrated quantization of the weights of a plan."""

    def weights(
        self, shards: Sequence[Sequence[str]], folder: Path, progress: Progress
    ) -> Iterator[tuple[str, Tensors | None]]:
        """Yield (name, tensors) for every name in `shards`; None means rounding to nearest.

        Asking for a weight of the next shard means that the last one is complete.
        """
        ...

    def work_bytes(self, shard_bytes: int) -> int:
        """Return the disk space, in bytes, that the work directory needs."""
        ...


@dataclass(frozen=True)
class Rewrite:
    """A repo to write: the source, its plan, and the quantization of calibrated weights.

    `hashes` name the inputs of the quantization, `shard_bytes` is the largest shard, headers aside.
    """

    source: Source
    plan: Plan
    out: Path
    quantization: Quantization | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)
    shard_bytes: int = SHARD_BYTES
    force: bool = False

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """The layout of the repo."""
        return lay_out(self.source.inventory, self.plan, self.shard_bytes)

    @property
    def key(self) -> InputKey:
        """The key of everything that the bytes of the shards depend on."""
        hashes = {
            "plan": self.plan.tiers_sha256,
            "shard size": str(self.shard_bytes),
            "device": "cpu" if on_cpu() else "gpu",
        }
        return input_key(self.source, {**hashes, **self.hashes})


@dataclass(frozen=True)
class Written:
    """The written files: the source with its files' hashes, the shards, and their companions.

    `work` is the work directory, which will be removed.
    """

    source: SourceId
    shards: tuple[ShardRecord, ...]
    files: tuple[SourceFile, ...]
    work: Path


@dataclass(frozen=True)
class RewriteOutcome:
    """The outcome: `complete` if the repo existed already, `resumed` if a run was resumed."""

    complete: bool = False
    resumed: bool = False


Documents = Callable[[Written], Mapping[str, str | bytes]]
"""Return the files that describe a repo (name -> content), given its written files."""


def rewrite(job: Rewrite, documents: Documents, progress: Progress | None = None) -> RewriteOutcome:
    """Write the repo, which appears at `job.out` complete or not at all.

    A killed run is resumed by the next one with the same inputs. An intact repo from the same
    inputs stays as it is, unless `force` is set. Raises OutputError (nothing was replaced),
    DamagedError (no output was left behind) or SourceError.
    """
    progress = progress or Progress()
    out, folder = plain_path(job.out), job.source.checkpoint.path("")
    require_apart(out, folder)
    beside = companions(folder, job.source.inventory)
    output = OutputDirectory(out, job.key, job.force)
    if not job.force and is_current(job, beside):
        output.tidy()
        return RewriteOutcome(complete=True)
    require_free(out, job.force)
    with output:
        resumed = output.resumed
        if resumed:
            progress.note(f"resuming the interrupted run in {output.folder}")
        try:
            source, records = _write_shards(job, output, progress)
        except (DamagedError, TierError):
            output.discard()
            raise
        config, inventory = job.source.checkpoint.config, job.source.inventory
        output.write("config.json", edit_config(config, inventory, job.plan))
        output.write(INDEX_FILE, _index(job.shards, job.plan))
        for name in beside:
            output.copy(folder / name, name)
        names = sorted(["config.json", INDEX_FILE, *beside])
        files = tuple(_file_record(output.repo, name) for name in names)
        for name, text in documents(Written(source, records, files, output.work)).items():
            write_atomically(output.repo / name, text)
        output.commit()
    return RewriteOutcome(resumed=resumed)


def is_current(job: Rewrite, beside: Sequence[str]) -> bool:
    """Return whether `job.out` is intact and equals the result of this rewrite.

    Compares versions, plan, shards, the `beside` companions, and the hashes of source and repo.
    """
    if not (job.out / REPORT_FILE).is_file():
        return False
    try:
        report = Report.from_json(load_json(job.out / REPORT_FILE), REPORT_FILE)
    except InputError:
        return False
    there = [(shard.name, shard.tensor_bytes) for shard in report.shards]
    if there != [(shard.name, shard.tensor_bytes) for shard in job.shards]:
        return False
    if report.versions != versions() or _decisions(report.plan) != _decisions(job.plan):
        return False
    path = job.source.checkpoint.path  # a mended chat template makes a repo outdated
    if not all(_has_hash(path(name), report.sha256s.get(name)) for name in beside):
        return False
    if not all(_has_hash(job.out / name, sha256) for name, sha256 in report.sha256s.items()):
        return False
    return report.plan.source.files == with_hashes(job.plan.source, file_hashes(job.source)).files


def _decisions(plan: Plan) -> tuple[object, ...]:
    """Return everything in a plan that the bytes of a repo depend on."""
    quantizer = (plan.quantizer, plan.tuning_steps, plan.calibration_texts)
    kept = None if plan.pruning is None else plan.pruning.kept
    return (plan.source.structure, plan.assignments, plan.unquantized, kept, *quantizer)


def _has_hash(path: Path, sha256: str | None) -> bool:
    return path.is_file() and hash_file(path, path.name) == sha256


def _write_shards(
    job: Rewrite, output: OutputDirectory, progress: Progress
) -> tuple[SourceId, tuple[ShardRecord, ...]]:
    """Return the source with the hashes of its files, and the records of the shards."""
    missing = [shard for shard in job.shards if output.finished(shard.name) is None]
    _require_space(job, output, missing)
    weights = None
    if job.quantization and missing:
        names = [[unit.name for unit in shard.units if unit.tier] for shard in missing]
        weights = job.quantization.weights(names, output.work, progress)
    stage = progress.stage(f"Writing {job.out.name}", job.plan.total_bytes)
    with _hashing(job.source) as hashes:
        for shard in job.shards:
            if output.finished(shard.name):
                stage(shard.tensor_bytes, shard.name)
            else:
                output.add(asdict(_write_shard(job, shard, weights, output, stage)))
        records = tuple(shard_record(output.finished(s.name) or {}) for s in job.shards)
        return with_hashes(job.plan.source, hashes.result()), records


def _require_space(job: Rewrite, output: OutputDirectory, missing: Sequence[Shard]) -> None:
    """Check the free space on the disk. Raises OutputError, which removes no finished work."""
    work = job.quantization.work_bytes(job.shard_bytes) if job.quantization and missing else 0
    output.require_space(work, sum(shard.tensor_bytes for shard in missing))


@contextmanager
def _hashing(source: Source) -> Iterator["Future[dict[str, str]]"]:
    """Compute the hashes of the source's shards in a thread, while they are read anyway."""
    stopped = Event()

    def require_running(_done: int, name: str) -> None:
        if stopped.is_set():
            raise SourceError(f"{name}: hashing was stopped.")

    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(file_hashes, source, require_running)
        finally:
            stopped.set()


def _write_shard(
    job: Rewrite,
    shard: Shard,
    weights: Iterator[tuple[str, Tensors | None]] | None,
    output: OutputDirectory,
    stage: Stage,
) -> ShardRecord:
    with ShardWriter(output.repo, shard) as writer:
        for unit in shard.units:
            weight = job.source.weights.get(unit.name)
            tensors = None
            if unit.tier is not None and weights is not None:
                name, tensors = next(weights)
                assert name == unit.name, f"{name} came for {unit.name}"
            storage = weight.storage if weight else None
            for block in unit_blocks(job.source, unit, storage, tensors):
                writer.write(block)
                stage(block.nbytes, unit.name)
        return writer.finish()


def _file_record(folder: Path, name: str) -> SourceFile:
    path = folder / name
    return SourceFile(name, path.stat().st_size, hash_file(path, name))


def _index(shards: tuple[Shard, ...], plan: Plan) -> dict[str, object]:
    names = {
        spec.name: shard.name for shard in shards for unit in shard.units for spec in unit.tensors
    }
    metadata = {"total_size": plan.total_bytes, "total_parameters": plan.kept_parameters}
    return {"metadata": metadata, "weight_map": dict(sorted(names.items()))}
