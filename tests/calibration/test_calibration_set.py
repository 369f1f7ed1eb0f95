"""The calibration text that ships with quantkit is whole, and its README tells where it is from."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import quantkit.calibration
from quantkit.calibration.calibration_set import (
    CalibrationSpec,
    load_tokenizer,
    read_calibration_set,
)
from quantkit.calibration.fingerprint import passages
from quantkit.calibration.splits import EVALUATE, SPLITS
from quantkit.checkpoint.source import open_source
from tests.support import hub
from tests.support.text import rows

FOLDER = Path(quantkit.calibration.__file__).parent / "data"
KINDS = ("prose", "code", "chat", "maths")
NAMES = [f"{split}/{kind}" for split in SPLITS for kind in KINDS]


def documents(name):
    text = (FOLDER / f"{name}.jsonl").read_bytes().decode("utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text[:-1].split("\n")]


def texts(name):
    for document in documents(name):
        if name.endswith("chat"):
            yield "\n".join(message["content"] for message in document["messages"])
        else:
            yield document["text"]


@pytest.mark.parametrize("name", NAMES)
def test_every_line_has_its_keys_and_a_known_origin(name):
    lines = (FOLDER / "README.md").read_text("utf-8").splitlines()
    known = {match[1] for row in lines if (match := re.match(r"\|[^|]*\| `([^`]+)`", row))}
    for document in documents(name):
        assert set(document) == {"messages" if name.endswith("chat") else "text", "origin"}
        assert document["origin"].partition(": ")[0] in known


@pytest.mark.parametrize("name", NAMES)
def test_text_is_clean(name):
    for text in texts(name):
        assert text.strip()
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffd]", text)
        assert not re.search(r"\w@\w+\.\w", text), "an e-mail address"


@pytest.mark.parametrize("name", NAMES)
def test_documents_are_neither_tiny_nor_long(name):
    assert all(150 <= len(text) <= 6000 for text in texts(name))


def test_no_document_comes_twice():
    every = [text for name in NAMES for text in texts(name)]
    assert len(set(every)) == len(every)


def test_it_stays_small():
    sizes = [(FOLDER / f"{name}.jsonl").stat().st_size for name in NAMES]
    assert sum(sizes) < 800_000


def test_no_split_shares_a_passage_with_another(demo):
    """No 16 tokens in a row, whatever the template adds around them."""
    tokenizer = load_tokenizer(open_source(str(demo)).checkpoint)
    found = {
        split: {
            hashed
            for kind in KINDS
            for text in texts(f"{split}/{kind}")
            for hashed in passages(np.array([tokenizer.encode(text)])).tolist()
        }
        for split in SPLITS
    }
    assert all(len(one) > 10_000 for one in found.values())
    for one, other in (SPLITS[:2], SPLITS[1:], SPLITS[::2]):
        assert not found[one] & found[other]


def test_it_evaluates_many_documents_of_all_kinds(demo):
    checkpoint = open_source(str(demo)).checkpoint
    text = read_calibration_set(checkpoint, CalibrationSpec(tokens=16384), EVALUATE)
    assert text.tokens.shape == (64, 256)
    assert text.text.documents >= 40
    assert set(text.kinds) == set(KINDS)
    assert min(text.kinds.count(kind) for kind in KINDS) > 8


def test_user_and_assistant_take_turns():
    chats = [document for split in SPLITS for document in documents(f"{split}/chat")]
    assert len(chats) > 100
    for document in chats:
        roles = [message["role"] for message in document["messages"]]
        assert len(roles) >= 2
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(set(message) == {"role", "content"} for message in document["messages"])


def test_text_of_a_data_set_on_the_hub(checkpoint, tmp_path, online):
    """Rows stream: the data set is not downloaded first."""
    folder = tmp_path / "words"
    folder.mkdir()
    rows(folder / "train.jsonl", seed=0, count=60, length=60)
    with hub.serving({"someone/words": folder}) as (endpoint, log):
        ran = online(
            endpoint,
            *("profile", checkpoint, "-o", tmp_path / "profile", "--calibration", "someone/words"),
            *("--tokens", "48", "--sequence-length", "24"),
        )
    assert ran.returncode == 0, ran.stderr
    made = json.loads((tmp_path / "profile" / "profile.json").read_text())["calibration"]
    assert (made["name"], made["tokens"]) == ("someone/words", 48)
    assert any("/datasets/someone/words/resolve/" in path for _, path, _ in log)


def test_every_sequence_begins_as_texts_do(checkpoint, tmp_path):
    """A tokenizer that adds a BOS token adds it to sequences from the middle of documents, too."""
    copy = shutil.copytree(checkpoint, tmp_path / "with-bos")
    path = copy / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    number = tokenizer.token_to_id("The")
    begin = TemplateProcessing(single="The $A", special_tokens=[("The", number)])
    tokenizer.post_processor = begin
    tokenizer.save(str(path))
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "The"}))
    text = rows(tmp_path / "text.jsonl", seed=0, count=60, length=60)
    spec = CalibrationSpec(str(text), tokens=96, sequence_length=24)
    plain = read_calibration_set(open_source(str(checkpoint)).checkpoint, spec)
    made = read_calibration_set(open_source(str(copy)).checkpoint, spec)
    assert made.tokens.shape == plain.tokens.shape == (4, 24)
    assert (made.tokens[:, 0] == number).all()
    assert (made.tokens[:, 1:] != number).sum() > 80  # it stands where documents begin, else words
    assert made.tokens[0, 1:].tolist() == plain.tokens[0, :-1].tolist()
