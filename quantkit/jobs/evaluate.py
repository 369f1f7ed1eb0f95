"""Evaluate: scores of repos on benchmarks, item by item, with records that resume."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.artifacts.scores import RIGHT, VERDICTS, Answer, Score
from quantkit.calibration.chat_template import PINNED_DATE
from quantkit.checkpoint import hub
from quantkit.checkpoint.model_config import ModelConfig
from quantkit.checkpoint.provenance import versions
from quantkit.checkpoint.source import open_checkpoint
from quantkit.errors import InputError
from quantkit.evaluation.benchmarks import (
    LETTERS,
    Benchmark,
    BenchmarkData,
    Item,
    load_benchmark,
    load_items,
    sample,
)
from quantkit.evaluation.official import function_schemas, require_checker
from quantkit.evaluation.paired import difference, wilson
from quantkit.evaluation.records import Record, Records
from quantkit.evaluation.scorers import verdict
from quantkit.generation.answers import AnswerFormat
from quantkit.generation.batches import BatchModel, Completion, Request, single_tokens
from quantkit.jobs.open_model import resolved
from quantkit.progress import Progress, Stage
from quantkit.storage.hash_cache import remembered_hash
from quantkit.storage.json_files import load_json

_LEAST = 64  # tokens of an answer with a final channel
_CHOICES = 4
_FILES = ("*.safetensors", "config.json", "generation_config.json", "token*.json", "*.jinja")


@dataclass(frozen=True)
class EvaluationSettings:
    """How answers are generated. `max_tokens` None: as each benchmark states."""

    max_tokens: int | None = None
    effort: str | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    repeats: int = 1

    def of(self, benchmark: Benchmark) -> "EvaluationSettings":
        """Return the settings with the longest answer of a benchmark, unless they state one."""
        return replace(self, max_tokens=self.max_tokens or benchmark.max_tokens)


@dataclass(frozen=True)
class EvaluationRequest:
    """The benchmarks, `limit` items of each (None: all), and where data and records are.

    `data` is a folder with local copies of the items; `results` is the folder of the records;
    `batch` is the number of prompts that are answered at once.
    """

    benchmarks: Sequence[str]
    limit: int | None = None
    data: Path | None = None
    results: Path = Path("eval-results")
    settings: EvaluationSettings = EvaluationSettings()
    batch: int | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class EvaluatedBenchmark:
    """A score, and the records behind it: of the model, and of the one it is compared to."""

    score: Score
    records: Sequence[Record]
    others: Sequence[Record] = ()


def evaluate(
    repo: str,
    request: EvaluationRequest,
    *,
    against: str | None = None,
    progress: Progress | None = None,
) -> list[EvaluatedBenchmark]:
    """Score a repo (a folder or Hub id that mlx-lm loads) on benchmarks.

    With `against`, another repo answers the same items. Finished records are read, unfinished
    ones go on. Raises InputError, before anything is hashed or loaded if a checker is missing.
    """
    progress = progress or Progress()
    if request.limit is not None and request.limit < 1:
        raise InputError("`limit` must be 1 or more.")
    benchmarks = [load_benchmark(name) for name in request.benchmarks]
    for benchmark in benchmarks:
        require_checker(benchmark.scorer)
    loaded = [load_items(benchmark, request.data) for benchmark in benchmarks]
    names = [resolved(name) for name in (repo, against) if name is not None]
    rows = [_EvaluatedModel(name, request, progress).records(loaded) for name in names]
    results = []
    for place, data in enumerate(loaded):
        records = rows[0][place]
        score = _score(data, records, request)
        others: Sequence[Record] = ()
        if against is not None:
            others = rows[1][place]
            compared = difference(Path(against).name, _by_item(records), _by_item(others))
            score = replace(score, against=compared)
        results.append(EvaluatedBenchmark(score, records, others))
    return results


class _EvaluatedModel:
    """A repo that answers items, loaded only if a record is missing."""

    def __init__(self, repo: str, request: EvaluationRequest, progress: Progress) -> None:
        self._repo, self._request, self._progress = repo, request, progress
        local = Path(repo).is_dir()
        self._folder = Path(repo) if local else hub.download(open_checkpoint(repo))
        self._hashes = _file_hashes(self._folder, Path(repo).name, progress)

    @cached_property
    def _model(self) -> BatchModel:
        return BatchModel(str(self._folder), trust_remote_code=self._request.trust_remote_code)

    @cached_property
    def _versions(self) -> dict[str, str]:
        return versions()

    @cached_property
    def _format(self) -> AnswerFormat:
        return AnswerFormat(self._model.tokenizer, self._request.settings.effort, PINNED_DATE)

    def records(self, loaded: Sequence[BenchmarkData]) -> list[list[Record]]:
        """Return the records of all sampled items of all benchmarks, in their order."""
        return [self._of_benchmark(data) for data in loaded]

    def _of_benchmark(self, data: BenchmarkData) -> list[Record]:
        settings = self._request.settings.of(data.benchmark)
        header = {
            "model": self._hashes,
            "data": data.digest,
            "definition": asdict(data.benchmark),
            "settings": asdict(settings),
        }
        records = Records(self._request.results, data.benchmark.name, header)
        items = sample(data.items, self._request.limit)
        wanted = [(item, turn) for item in items for turn in range(settings.repeats)]
        missing = [(item, turn) for item, turn in wanted if (item.id, turn) not in records.rows]
        name = f"{data.benchmark.title}, {Path(self._repo).name}"
        stage = self._progress.stage(name, len(wanted), "answers")
        stage(len(wanted) - len(missing), "resumed")
        if missing:
            for row in self._answered(data, missing, settings):
                records.add(row)
                _tell(stage, records)
            records.sort([item.id for item in data.items])
        return [records.rows[item.id, turn] for item, turn in wanted]

    def _answered(
        self,
        data: BenchmarkData,
        missing: Sequence[tuple[Item, int]],
        settings: EvaluationSettings,
    ) -> Iterator[Record]:
        benchmark, limit = data.benchmark, settings.max_tokens
        assert limit is not None
        choice = benchmark.scorer == "letter"
        if not choice and self._format.has_channels and limit < _LEAST:
            raise InputError(
                f"`max_tokens` {limit}: too few for reasoning and an answer in the final channel. "
                f"Give {_LEAST} or more."
            )
        prompts = [self._prompt(benchmark, item) for item, _ in missing]
        among = self._letters(benchmark) if choice else ()
        requests = [Request(prompt, 1 if choice else limit, among) for prompt in prompts]
        self._note_long(benchmark, [len(prompt) + limit for prompt in prompts])
        last = time.monotonic()
        for done in self._model.complete(
            requests,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
            batch=self._request.batch,
        ):
            before, last = last, time.monotonic()
            item, turn = missing[done.number]
            row = self._record(benchmark, item, done)
            prompt = self._model.tokenizer.decode(prompts[done.number])
            seconds = round(last - before, 3)  # since the answer before
            yield {"id": item.id, "repeat": turn, **row, "prompt": prompt, "seconds": seconds}

    def _record(self, benchmark: Benchmark, item: Item, done: Completion) -> Record:
        """Return the record of an answer, without its prompt and time."""
        choice = benchmark.scorer == "letter"
        answer = _letter(done) if choice else self._answer(benchmark, item, done)
        return {
            "verdict": verdict(benchmark.scorer, item.fields, answer),
            "final": answer.final,
            "calls": [list(call) for call in answer.calls],
            "output": self._model.tokenizer.decode(done.tokens),
            "tokens": len(done.tokens),
            "arithmetic": self._model.arithmetic,
            "versions": self._versions,
        }

    def _note_long(self, benchmark: Benchmark, lengths: Sequence[int]) -> None:
        """Tell how many prompts with their longest answers exceed the model's context."""
        context = ModelConfig.parse(load_json(self._folder / "config.json")).context
        longer = sum(length > context for length in lengths) if context else 0
        if longer:
            self._progress.note(
                f"{benchmark.title}: {longer} of {len(lengths)} prompts, with an answer as long as "
                f"it may be, exceed the context of {context} tokens."
            )

    def _prompt(self, benchmark: Benchmark, item: Item) -> list[int]:
        if benchmark.raw:
            return self._format.plain_prompt(item.prompt)
        choice = benchmark.scorer == "letter"
        return self._format.prompt(item.prompt, _functions(benchmark, item), at_answer=choice)

    def _letters(self, benchmark: Benchmark) -> list[int]:
        """Return the tokens of the letters of a multiple choice."""
        space = " " if benchmark.raw else ""
        return single_tokens(self._model.tokenizer, [space + x for x in LETTERS[:_CHOICES]])

    def _answer(self, benchmark: Benchmark, item: Item, done: Completion) -> Answer:
        functions = _functions(benchmark, item)
        return self._format.answer(done.tokens, truncated=done.truncated, functions=functions)


def _functions(benchmark: Benchmark, item: Item) -> list[Mapping[str, Any]]:
    return function_schemas(item.fields[benchmark.tools]) if benchmark.tools else []


def _letter(done: Completion) -> Answer:
    assert done.log_probabilities is not None
    return Answer(LETTERS[int(done.log_probabilities.argmax())])


def _tell(stage: Stage, records: Records) -> None:
    rows = records.rows.values()
    right = sum(row["verdict"] == RIGHT for row in rows)
    stage(1, f"{100 * right / len(rows):.1f}% right")


def _file_hashes(folder: Path, name: str, progress: Progress) -> dict[str, str]:
    """Return the sha256 of every file of a model that decides its answers, by name."""
    files = sorted(path for pattern in _FILES for path in folder.glob(pattern))
    if not any(path.suffix == ".safetensors" for path in files):
        raise InputError(f"{name}: not a model: it has no .safetensors file.")
    stage = progress.stage(f"Hashing {name}", sum(path.stat().st_size for path in files))
    return {path.name: remembered_hash(path, path.name, stage) for path in files}


def _by_item(records: Sequence[Record]) -> list[float]:
    """Return the share of right answers to every item."""
    shares: dict[str, list[bool]] = {}
    for row in records:
        shares.setdefault(row["id"], []).append(row["verdict"] == RIGHT)
    return [float(np.mean(turns)) for turns in shares.values()]


def _score(data: BenchmarkData, records: Sequence[Record], request: EvaluationRequest) -> Score:
    by_item = _by_item(records)
    counted = Counter(row["verdict"] for row in records)
    seconds = sum(row["seconds"] for row in records)
    settings = request.settings.of(data.benchmark)
    return Score(
        data.benchmark.name,
        data.benchmark.title,
        len(by_item),
        len(by_item) == len(data.items),
        wilson(sum(by_item), len(by_item)),
        {name: counted[name] for name in VERDICTS},
        sum(row["tokens"] for row in records) / seconds if seconds else 0.0,
        {**asdict(settings), "arithmetic": records[0]["arithmetic"]},
    )
