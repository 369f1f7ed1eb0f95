"""Whole passages of books and speeches, and whole functions of programs."""

import ast
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from random import Random

SHORTEST, LONGEST = 1500, 6000
MODULES = (
    *("asyncio/locks.py", "asyncio/queues.py", "asyncio/runners.py", "asyncio/streams.py"),
    *("asyncio/timeouts.py", "cmd.py", "codeop.py", "collections/__init__.py", "compileall.py"),
    *("configparser.py", "contextlib.py", "copy.py", "copyreg.py", "csv.py", "dataclasses.py"),
    *("datetime.py", "difflib.py", "dis.py", "email/_encoded_words.py", "fileinput.py"),
    *("fractions.py", "getopt.py", "graphlib.py", "gzip.py", "hmac.py", "html/parser.py"),
    *("http/cookiejar.py", "importlib/util.py", "inspect.py", "json/decoder.py"),
    *(
        "json/encoder.py",
        "mailbox.py",
        "mimetypes.py",
        "modulefinder.py",
        "operator.py",
    ),
    *("pathlib.py", "pickletools.py", "pkgutil.py", "posixpath.py", "pprint.py", "queue.py"),
    *("sched.py", "selectors.py", "shelve.py", "shutil.py", "symtable.py", "tabnanny.py"),
    *("threading.py", "tokenize.py", "traceback.py", "types.py", "unittest/case.py"),
    *("unittest/loader.py", "unittest/util.py", "urllib/parse.py", "warnings.py", "weakref.py"),
    *("wsgiref/handlers.py", "wsgiref/util.py", "zipapp.py", "zipfile.py", "zoneinfo/_common.py"),
)
NOVELS = (
    *("Emma", "Mansfield Park", "Northanger Abbey"),
    *("Persuasion", "Pride and Prejudice", "Sense and Sensibility"),
)


def from_moby_dick(book: Path, rng: Random) -> Iterator[tuple[str, str]]:
    """Passages of Melville, at most one from a chapter."""
    chapters = re.split(r"^(?=CHAPTER \d+\. )", book.read_text("utf-8"), flags=re.MULTILINE)
    for chapter in rng.sample(chapters[1:], len(chapters) - 1):
        heading, _, body = chapter.partition("\n")
        if passage := whole_paragraphs(body, rng):
            yield passage, heading.strip()


def from_austen(database: Path, rng: Random) -> Iterator[tuple[str, str]]:
    """Passages of Austen, eight from each novel, from the lines that an R package keeps."""
    for name, lines in zip(NOVELS, r_strings(database.read_bytes()), strict=True):
        chapters = re.split(r"^(?=chapter )", "\n".join(lines), flags=re.MULTILINE | re.IGNORECASE)
        for chapter in rng.sample(chapters[1:], 8):
            heading, _, body = chapter.partition("\n")
            if passage := whole_paragraphs(body, rng):
                yield passage, f"{name}, {heading.strip().lower()}"


def from_speeches(folder: Path, rng: Random) -> Iterator[tuple[str, str]]:
    """A run of whole sentences from every seventh State of the Union address before 1990."""
    for speech in [path for path in sorted(folder.glob("*.txt")) if path.name < "1990"][::7]:
        text = " ".join(speech.read_text("utf-8").split())
        # A full stop after a long word in small letters ends a sentence; "Mr." and "U.S." do not.
        sentences = re.split(r"(?<=[a-z]{3}[.?!]) (?=[A-Z])", text)
        size, start = rng.randint(1800, 4200), rng.randrange(len(sentences) // 2)
        passage = ""
        for sentence in sentences[start:-1]:
            passage = f"{passage} {sentence}".strip()
            if len(passage) >= size:
                break
        if SHORTEST <= len(passage) <= LONGEST:
            yield passage, speech.name


def whole_paragraphs(body: str, rng: Random) -> str:
    """Paragraphs in a row, their lines joined; empty where the text is too short or is verse."""
    blocks = [block.splitlines() for block in re.split(r"\n\s*\n", body.strip())]
    paragraphs = [" ".join(" ".join(lines).split()) for lines in blocks if not is_verse(lines)]
    size, start = rng.randint(1800, 4200), rng.randrange(max(1, len(paragraphs) // 2))
    kept: list[str] = []
    for paragraph in paragraphs[start:]:
        kept.append(paragraph)
        passage = "\n\n".join(kept)
        if len(passage) >= size and re.search(r"[.?!]\W?$", paragraph):
            return passage if len(passage) <= LONGEST else ""
    return ""


def is_verse(lines: list[str]) -> bool:
    """Whether a block is verse, a heading or a list: several lines, and none of them full."""
    return lines[0].isupper() or (len(lines) > 2 and all(len(line) < 60 for line in lines))


def r_strings(database: bytes) -> Iterator[list[str]]:
    """The character vectors of an R database file: each is a length, then zlib data.

    Inside, a vector is the type 16 and a count; a string its flags, a length (-1: missing), bytes.
    """
    while database:
        unpack = zlib.decompressobj()
        data = unpack.decompress(database[4:])
        database = unpack.unused_data
        place = data.find(b"\0\0\0\x10")
        if place < 0:
            continue
        (count,) = struct.unpack_from(">i", data, place + 4)
        place += 8
        strings = []
        for _ in range(count):
            _, length = struct.unpack_from(">ii", data, place)
            strings.append(data[place + 8 : place + 8 + max(length, 0)].decode("utf-8"))
            place += 8 + max(length, 0)
        if count > 1000:
            yield strings


def from_library(library: Path, rng: Random) -> Iterator[tuple[str, str]]:
    """One document from each module: whole statements of its top level, in a row."""
    for module in MODULES:
        source = (library / module).read_text("utf-8")
        lines = source.splitlines(keepends=True)
        body = ast.parse(source).body
        ends = [0, *(statement.end_lineno or 0 for statement in body)]
        runs = []
        for start in range(len(body)):
            size = rng.randint(1800, 4000)
            for end in range(start + 1, len(ends)):
                text = "".join(lines[ends[start] : ends[end]]).strip("\n")
                if len(text) >= size:
                    if len(text) <= LONGEST:
                        runs.append(text)
                    break
        if runs:
            yield f"{rng.choice(runs)}\n", module


def from_package(folder: Path) -> Iterator[tuple[str, str]]:
    """The source files of an npm package that are neither tiny nor long, nor taken from others."""
    for path in sorted(folder.glob("src/*.[jt]s")):
        text = path.read_text("utf-8")
        if SHORTEST <= len(text) <= LONGEST and path.stem != "index" and "://" not in text:
            yield text, f"src/{path.name}"
