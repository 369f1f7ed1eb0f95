"""A conversation with a repo."""

import pytest

from quantkit.generation.chat_model import ChatModel, SamplingParameters
from tests.support import standin


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    if not standin.PUBLISHED.is_dir():
        pytest.skip(f"NOT TESTED with the published tokenizer: no {standin.PUBLISHED}")
    return ChatModel(str(standin.write_published(tmp_path_factory.mktemp("chat") / "gpt-oss")))


def test_a_turn_reads_only_its_new_messages(model):
    """Sliding windows of 128 tokens have passed when the second turn comes."""
    few = SamplingParameters(max_tokens=3)
    first = [{"role": "user", "content": "word " * 300}]
    list(model.answer(first, few))
    assert model.reread > 300
    turns = [*first, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And?"}]
    said = list(model.answer(turns, few))
    assert model.reread < 20
    fresh = ChatModel.__new__(ChatModel)
    fresh.__dict__.update(model.__dict__)
    fresh._caches = type(model._caches)(2)
    assert list(fresh.answer(turns, few)) == said
    assert fresh.reread > 300


def test_a_raw_answer_has_its_marks(model):
    texts = list(
        model.raw_answer([{"role": "user", "content": "x"}], SamplingParameters(max_tokens=3))
    )
    assert len(texts) == 3


def test_answers_that_reach_the_longest_length_are_none(model):
    """Babble seldom is read as the tokens that it was written in."""
    chats = [[{"role": "user", "content": f"{number}"}] for number in range(8)]
    cut = SamplingParameters(max_tokens=12, temperature=1.0)
    assert model.answers(chats, cut) == [None] * len(chats)
