"""The calibration text that ships with quantkit is whole, and its README tells where it is from."""

import json
import re
from pathlib import Path

import pytest

import quantkit.calibration

FOLDER = Path(quantkit.calibration.__file__).parent / "data"
NAMES = ("prose", "code", "chat", "maths")
LENGTHS = {"prose": (1500, 6000), "code": (1500, 6000), "maths": (300, 2500)}


def documents(name):
    text = (FOLDER / f"{name}.jsonl").read_bytes().decode("utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text[:-1].split("\n")]


def texts(name):
    for document in documents(name):
        if name == "chat":
            yield "\n".join(message["content"] for message in document["messages"])
        else:
            yield document["text"]


@pytest.mark.parametrize("name", NAMES)
def test_every_line_has_its_keys_and_a_known_origin(name):
    rows = (FOLDER / "README.md").read_text("utf-8").splitlines()
    known = {match[1] for row in rows if (match := re.match(r"\|[^|]*\| `([^`]+)`", row))}
    for document in documents(name):
        assert set(document) == {"messages" if name == "chat" else "text", "origin"}
        assert document["origin"].partition(": ")[0] in known


@pytest.mark.parametrize("name", NAMES)
def test_text_is_clean(name):
    for text in texts(name):
        assert text.strip()
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffd]", text)
        assert not re.search(r"\w@\w+\.\w", text), "an e-mail address"


@pytest.mark.parametrize("name", LENGTHS)
def test_documents_are_neither_tiny_nor_long(name):
    low, high = LENGTHS[name]
    assert all(low <= len(text) <= high for text in texts(name))


def test_no_document_comes_twice():
    every = [text for name in NAMES for text in texts(name)]
    assert len(set(every)) == len(every)


def test_it_stays_small():
    sizes = [(FOLDER / f"{name}.jsonl").stat().st_size for name in NAMES]
    assert sum(sizes) < 600_000
    assert min(sizes) > 120_000


def test_user_and_assistant_take_turns():
    for document in documents("chat"):
        roles = [message["role"] for message in document["messages"]]
        assert len(roles) >= 4
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(set(message) == {"role", "content"} for message in document["messages"])
