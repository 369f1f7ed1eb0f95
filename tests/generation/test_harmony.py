"""Messages of gpt-oss, read from tokens."""

import pytest

from quantkit.generation.harmony import Channels, HarmonyReader
from tests.support import standin


@pytest.fixture(scope="module")
def channels(tmp_path_factory):
    from mlx_lm.utils import load_tokenizer

    folder = standin.write_own(tmp_path_factory.mktemp("own"))
    return Channels(load_tokenizer(folder))


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
    ("<|start|><|start|><|channel|><|channel|><|message|><|message|><|constrain|><|end|><|end|>", []),
]  # fmt: skip


@pytest.mark.parametrize(("text", "messages"), CASES)
def test_messages(channels, text, messages):
    reader = HarmonyReader(channels)
    tokens = channels.tokenizer.encode(text, add_special_tokens=False)
    deltas = [delta for token in tokens for delta in reader.push(token)] + reader.finish()
    texts = {}
    for delta in deltas:
        key = (delta.message, delta.channel, delta.recipient)
        texts[key] = texts.get(key, "") + delta.text
    assert [
        (channel, recipient, text) for (_, channel, recipient), text in texts.items()
    ] == messages
    assert [delta.message for delta in deltas] == sorted(delta.message for delta in deltas)
