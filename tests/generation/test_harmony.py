"""Messages of gpt-oss, read from tokens."""

import pytest

from quantkit.generation.harmony import Channels, HarmonyReader
from tests.support import standin


@pytest.fixture(scope="module")
def channels(tmp_path_factory):
    from mlx_lm.utils import load_tokenizer

    folder = standin.write_own(tmp_path_factory.mktemp("own"))
    return Channels(load_tokenizer(folder))


@pytest.fixture(scope="module")
def published():
    from mlx_lm.utils import load_tokenizer

    if not standin.PUBLISHED.is_dir():
        pytest.skip(f"NOT TESTED with the published tokenizer: no {standin.PUBLISHED}")
    return Channels(load_tokenizer(standin.PUBLISHED))


CASES = [
    ("<|channel|>final<|message|>a<|return|>", [("final", None, "a")]),
    ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b", [("analysis", None, "a"), ("final", None, "b")]),
    ("a<|end|>", [("final", None, "a")]),
    ("a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>", [("analysis", None, "a"), ("final", None, "b")]),
    ("<|message|>a<|return|>", [("final", None, "a")]),
    ("<|channel|>final a b<|return|>", [("final", None, "a b ")]),
    ("<|channel|>final a<|message|>b<|return|>", [("final", None, "a b")]),
    ("<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>", [("commentary", "functions.f", "{}")]),
    (" to=functions.f<|channel|>commentary json<|message|>{}<|call|>", [("commentary", "functions.f", "{}")]),
    ("<|start|>assistant to=functions.f<|channel|>analysis code<|message|>{}<|call|>", [("analysis", "functions.f", "{}")]),
    ("<|start|>assistant to=functions.f<|message|>{}<|call|>", [("commentary", "functions.f", "{}")]),
    ("<|channel|>commentary to=functions.f<|message|><|call|>", [("commentary", "functions.f", "")]),
    ("<|channel|>commentary to=functions.f<|call|>", [("commentary", "functions.f", "")]),
    (
        "<|channel|>commentary to=functions.f<|message|>1<|end|><|start|>assistant<|channel|>commentary to=functions.f<|message|>2<|call|>",
        [("commentary", "functions.f", "1"), ("commentary", "functions.f", "2")],
    ),
    (
        "<|channel|>analysis<|message|> a<|end|><|start|>assistant<|channel|>final<|message|>    b\n  c<|return|>",
        [("analysis", None, " a"), ("final", None, "    b\n  c")],
    ),
    ("<|channel|>final<|message|> <|return|>", [("final", None, " ")]),
    ("<|start|><|start|><|channel|><|channel|><|message|><|message|><|constrain|><|end|><|end|>", []),
]  # fmt: skip


def read(channels, text):
    """The deltas of an answer, and its messages: channel, recipient and text."""
    reader = HarmonyReader(channels)
    tokens = channels.tokenizer.encode(text, add_special_tokens=False)
    deltas = [delta for token in tokens for delta in reader.push(token)] + reader.finish()
    texts = {}
    for delta in deltas:
        key = (delta.message, delta.channel, delta.recipient)
        texts[key] = texts.get(key, "") + delta.text
    return deltas, [(channel, recipient, text) for (_, channel, recipient), text in texts.items()]


@pytest.mark.parametrize(("text", "messages"), CASES)
def test_messages(channels, text, messages):
    deltas, written = read(channels, text)
    assert written == messages
    assert [delta.message for delta in deltas] == sorted(delta.message for delta in deltas)


@pytest.mark.parametrize(
    "code", ["    return 1\n", " x", "\treturn 1", "  - a\n  - b", "x", " é😀"]
)
def test_code_of_gpt_oss_keeps_its_indent(published, code):
    text = f"<|channel|>analysis<|message|>{code}<|end|><|start|>assistant<|channel|>final<|message|>{code}<|return|>"
    assert read(published, text)[1] == [("analysis", None, code), ("final", None, code)]
