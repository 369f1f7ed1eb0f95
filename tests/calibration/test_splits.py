"""Documents are split before anything is cut, and near-copies go together."""

import json

import numpy as np
import pytest

from quantkit.calibration.calibration_set import CalibrationSpec, read_calibration_set
from quantkit.calibration.fingerprint import passages
from quantkit.calibration.splits import CALIBRATE, EVALUATE, SPLITS, VALIDATE, Document, assign
from quantkit.checkpoint.source import open_source
from quantkit.errors import CalibrationError

LENGTH = 16


def document(tokens, place):
    return Document(list(tokens), passages(np.array([tokens])), place)


def random_documents(count, seed=0, length=60):
    rng = np.random.default_rng(seed)
    return [document(rng.integers(0, 50000, length), rng.random()) for _ in range(count)]


def splits_of(documents):
    return [split for split, _, _ in assign(iter(documents), "text")]


def test_every_split_gets_its_share():
    splits = splits_of(random_documents(900))
    shares = {split: splits.count(split) / 900 for split in SPLITS}
    assert shares == pytest.approx({CALIBRATE: 0.75, VALIDATE: 0.1, EVALUATE: 0.15}, abs=0.03)


@pytest.mark.parametrize("count", [3, 4, 10])
@pytest.mark.parametrize("place", [0.0, 0.99])
def test_a_few_documents_serve_all_splits(count, place):
    """Also where the hashes of all fall into one split."""
    documents = [document(d.tokens, place) for d in random_documents(count)]
    assert set(splits_of(documents)) == set(SPLITS)


def test_the_order_does_not_matter():
    documents = random_documents(40)
    forward, backward = splits_of(documents), splits_of(documents[::-1])
    assert forward == backward[::-1]


def test_near_copies_go_together():
    rng = np.random.default_rng(1)
    documents = random_documents(30)
    copies = [
        document([*d.tokens[:30], *rng.integers(0, 50000, 30)], rng.random()) for d in documents
    ]
    found = list(assign(iter([*documents, *copies]), "text"))
    assert [(s, n) for s, n, _ in found[:30]] == [(s, n) for s, n, _ in found[30:]]


def test_copies_that_come_late_in_a_stream():
    rng = np.random.default_rng(1)
    documents = random_documents(1500)
    copies = [
        document([*d.tokens[:30], *rng.integers(0, 50000, 30)], rng.random()) for d in documents
    ]
    found = list(assign(iter([*documents, *copies]), "text"))
    assert [(s, n) for s, n, _ in found[:1500]] == [(s, n) for s, n, _ in found[1500:]]
    both = document([*documents[0].tokens, *documents[1].tokens], 0.5)
    other = next(d for s, _, d in found if s != found[0][0])
    both = document([*documents[0].tokens, *other.tokens], 0.5)
    assert len(list(assign(iter([*documents, both]), "text"))) == 1500  # of two splits: left out


def test_a_frame_that_all_documents_share_makes_no_copies():
    frame = list(range(30))
    documents = [document([*frame, *d.tokens], d.place) for d in random_documents(200)]
    assert splits_of(documents).count(EVALUATE) > 15


@pytest.mark.parametrize("copies", [0, 1, 40])
def test_one_document_cannot_be_split(copies):
    one = random_documents(1)
    with pytest.raises(CalibrationError, match="text: has 1 different document, too few"):
        splits_of(one * (1 + copies))


@pytest.mark.parametrize("kind", [".jsonl", ".txt"])
def test_splits_of_a_file_share_no_passage(tmp_path, checkpoint, kind):
    """A file with repeated documents, and ones that begin alike."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(3, 64, 600)) for _ in range(40)]
    texts += texts[::3] + [text[:1200] + texts[0][-900:] for text in texts[::5]]
    path = tmp_path / f"text{kind}"
    if kind == ".txt":
        path.write_text("\n\n".join(texts))
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = open_source(str(checkpoint)).checkpoint
    found = {
        s: read_calibration_set(source, CalibrationSpec(str(path), 10**6, LENGTH), s)
        for s in SPLITS
    }
    hashes = {split: inside(one) for split, one in found.items()}
    assert all(len(one) > 500 for one in hashes.values())
    for split in (CALIBRATE, VALIDATE):
        assert not np.isin(hashes[split], hashes[EVALUATE]).any()
    assert not np.isin(hashes[CALIBRATE], hashes[VALIDATE]).any()
    assert all(one.text.documents >= 2 for one in found.values())


def inside(text):
    """Return the passages of 16 tokens that lie in one document, across sequences."""
    tokens, documents = text.tokens.reshape(-1), text.documents.reshape(-1)
    runs = [tokens[documents == number] for number in np.unique(documents)]
    return np.unique(np.concatenate([passages(run[None]) for run in runs if len(run) >= 16]))


def test_no_document_dominates_what_is_evaluated(tmp_path, checkpoint):
    rng = np.random.default_rng(0)
    path = tmp_path / "text.jsonl"
    texts = [" ".join(f"w{i}" for i in rng.integers(3, 64, 2000)) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = open_source(str(checkpoint)).checkpoint
    text = read_calibration_set(source, CalibrationSpec(str(path), 4096, LENGTH), EVALUATE)
    _, counts = np.unique(text.documents, return_counts=True)
    assert len(counts) > 4
    assert counts.max() <= 4096 / 64


def test_less_than_a_sequence_in_a_split(tmp_path, checkpoint):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"w{i} w{i + 1}"}) + "\n" for i in range(20)))
    source = open_source(str(checkpoint)).checkpoint
    for split in SPLITS:
        with pytest.raises(CalibrationError, match=f"documents to {split} on have less than one"):
            read_calibration_set(source, CalibrationSpec(str(path), 4096, 256), split)
