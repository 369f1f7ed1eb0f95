"""Answers in generated tokens: the final channel, calls, and thoughts."""

from datetime import date

import pytest

from quantkit.artifacts.scores import Answer
from quantkit.checkpoint.stock import load_tokenizer
from quantkit.errors import InputError
from quantkit.generation.answers import AnswerFormat, parse_calls
from quantkit.generation.harmony import Delta
from tests.support import standin

TODAY = date(2025, 8, 5)
FUNCTION = {"name": "gcd", "description": "", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = standin.write_own(tmp_path_factory.mktemp("model") / "gpt-oss")
    return load_tokenizer(folder, "stand-in")


@pytest.fixture(scope="module")
def harmony(tokenizer):
    return AnswerFormat(tokenizer, "low", TODAY)


def answered(harmony, tokenizer, text, **options):
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return harmony.answer(tokens, truncated=False, **options)


def test_only_the_final_channel_counts(harmony, tokenizer):
    text = (
        "<|channel|>analysis<|message|>It is 7.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is 8."
    )
    assert answered(harmony, tokenizer, text) == Answer("It is 8.", [])


def test_thought_alone_is_no_answer(harmony, tokenizer):
    text = "<|channel|>analysis<|message|>It is 7.<|end|>"
    assert answered(harmony, tokenizer, text) == Answer(None, [])


def test_calls(harmony, tokenizer):
    text = (
        "<|channel|>commentary to=functions.gcd <|constrain|>json<|message|>"
        '{"a": 4, "b": 6}<|call|>'
    )
    assert answered(harmony, tokenizer, text) == Answer(None, [("gcd", {"a": 4, "b": 6})])
    broken = "<|channel|>commentary to=functions.gcd<|message|>{broken<|call|>"
    assert answered(harmony, tokenizer, broken) == Answer(None, [])


def test_prompts_end_where_the_answer_begins(harmony, tokenizer):
    prompt = tokenizer.decode(harmony.prompt("Which?", at_answer=True))
    assert prompt.endswith("<|start|>assistant<|channel|>final<|message|>")
    assert "Reasoning: low" in prompt
    assert "2025-08-05" in prompt


def test_functions_are_offered(harmony, tokenizer):
    assert "gcd" in tokenizer.decode(harmony.prompt("Which?", [FUNCTION]))


def test_a_model_without_a_template(tmp_path):
    folder = standin.write_own(tmp_path / "gpt-oss")
    (folder / "chat_template.jinja").unlink()
    plain = AnswerFormat(load_tokenizer(folder, "plain"), None, TODAY)
    with pytest.raises(InputError, match="no chat template"):
        plain.prompt("Which?")


class Thinking:
    """A tokenizer without channels whose model thinks in tags, and calls in tags."""

    tool_call_start, tool_call_end = "<tool_call>", "</tool_call>"
    chat_template = "{{ tools }}"

    def get_vocab(self):
        return {}

    @staticmethod
    def tool_parser(text, tools):
        import json

        return json.loads(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>7?</think>8", Answer("8", [])),
        ("<think>7?", Answer(None, [])),
        ("8", Answer("8", [])),
        (
            '<tool_call>{"name": "gcd", "arguments": {"a": 1}}</tool_call>',
            Answer(
                '<tool_call>{"name": "gcd", "arguments": {"a": 1}}</tool_call>', [("gcd", {"a": 1})]
            ),
        ),
        ("<tool_call>{broken</tool_call>", Answer("<tool_call>{broken</tool_call>", [])),
    ],
)
def test_models_without_channels(text, expected, monkeypatch):
    plain = AnswerFormat(Thinking(), None, TODAY)
    delta = Delta("final", text)
    monkeypatch.setattr(plain._channels, "deltas", lambda tokens: iter([delta]))
    assert plain.answer([1], truncated=False, functions=[FUNCTION]) == expected


@pytest.mark.parametrize(
    "call",
    [
        '{"arguments": {"a": 1}}',
        '{"name": null, "arguments": {"a": 1}}',
        '{"name": ["gcd"], "arguments": {"a": 1}}',
        '{"name": "gcd", "arguments": [1, 2]}',
        '{"name": "gcd", "arguments": "a=1"}',
        '"gcd"',
        "null",
        "[7, null]",
    ],
)
def test_a_malformed_call_is_no_call(call):
    assert parse_calls(Thinking(), call, [FUNCTION]) == []
    both = f'[{call}, {{"name": "gcd", "arguments": {{"a": 1}}}}]'
    assert parse_calls(Thinking(), both, [FUNCTION]) == [("gcd", {"a": 1})]


def test_a_malformed_call_is_an_answer_without_calls(monkeypatch):
    plain = AnswerFormat(Thinking(), None, TODAY)
    text = '<tool_call>{"arguments": {"a": 1}}</tool_call>'
    monkeypatch.setattr(plain._channels, "deltas", lambda tokens: iter([Delta("final", text)]))
    assert plain.answer([1], truncated=False, functions=[FUNCTION]) == Answer(text, [])


def test_arguments_that_are_not_json_are_no_call():
    tokenizer = Thinking()
    tokenizer.tool_parser = lambda text, tools: {"name": "gcd", "arguments": {"a": {1, 2}}}
    assert parse_calls(tokenizer, "[gcd(a={1, 2})]", [FUNCTION]) == []
