"""Scorers against known answers: what is right, wrong, cut off, or only thought."""

import pytest

from quantkit.artifacts.scores import NO_ANSWER, RIGHT, SCORER_ERROR, TRUNCATED, WRONG, Answer
from quantkit.evaluation.benchmarks import load_benchmark, load_items
from quantkit.evaluation.scorers import SCORERS, verdict

MMLU = {"answer": 2}
GSM8K = {"answer": "9 * 2 = <<9*2=18>>18\n#### 1,018"}
IFEVAL = {
    "key": 1,
    "prompt": "Say hello without commas in at least two sentences.",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_sentences"],
    "kwargs": [{}, {"num_sentences": 2, "relation": "at least"}],
}
BFCL = {
    "function": [
        {
            "name": "math.gcd",
            "description": "",
            "parameters": {
                "type": "dict",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
            },
        }
    ],
    "ground_truth": [{"math.gcd": {"a": [4], "b": [6]}}],
}
HUMANEVAL = {
    "entry_point": "double",
    "prompt": 'def double(x: int) -> int:\n    """Double x."""\n',
    "test": "def check(f):\n    assert f(2) == 4\n    assert f(-1) == -2\n",
}
HASH = {"query": "abcdefghijklmnop", "answer": "QRSTUVWXYZabcdef"}
CASES = [
    ("letter", MMLU, Answer("C"), RIGHT),
    ("letter", MMLU, Answer("A"), WRONG),
    ("number", GSM8K, Answer("It is 7 and then\n1018"), RIGHT),
    ("number", GSM8K, Answer("The answer is **$1,018.00**."), RIGHT),
    ("number", GSM8K, Answer("1018 is wrong, it is 17"), WRONG),
    ("number", GSM8K, Answer("no number"), WRONG),
    ("instructions", IFEVAL, Answer("Hello there. I am Mr. Smith."), RIGHT),
    ("instructions", IFEVAL, Answer("Hello, there. I am here."), WRONG),
    ("instructions", IFEVAL, Answer("Hello Mr. Smith"), WRONG),
    ("call", BFCL, Answer(None, [("math_gcd", {"a": 4, "b": 6})]), RIGHT),
    ("call", BFCL, Answer("[math.gcd(a=4, b=6)]"), RIGHT),
    ("call", BFCL, Answer(None, [("math_gcd", {"a": 4, "b": 7})]), WRONG),
    ("call", BFCL, Answer(None, [("math_gcd", {"a": 4})]), WRONG),
    ("call", BFCL, Answer("[math.gcd(a=4, b=6), math.gcd(a=4, b=6)]"), WRONG),
    ("call", BFCL, Answer("The gcd is 2."), WRONG),
    (
        "program",
        HUMANEVAL,
        Answer("Sure:\n```python\ndef double(x):\n    return x + x\n```"),
        RIGHT,
    ),
    ("program", HUMANEVAL, Answer("    return 2 * x"), RIGHT),
    ("program", HUMANEVAL, Answer("```python\ndef double(x):\n    return x * x\n```"), WRONG),
    ("program", HUMANEVAL, Answer("I cannot."), WRONG),
    ("chain_end", HASH, Answer("abcdefghijklmnop is QRSTUVWXYZabcdef."), RIGHT),
    ("chain_end", HASH, Answer("'QRSTUVWXYZabcdef', from abcdefghijklmnop"), RIGHT),
    ("chain_end", HASH, Answer("ZZSTUVWXYZabcdef"), WRONG),
]


@pytest.mark.parametrize(("scorer", "fields", "answer", "expected"), CASES)
def test_known_answers(scorer, fields, answer, expected):
    assert verdict(scorer, fields, answer) == expected


@pytest.mark.parametrize("scorer", SCORERS)
def test_what_was_cut_off_or_only_thought_is_wrong(scorer):
    right = next(answer for name, _, answer, seen in CASES if name == scorer and seen == RIGHT)
    fields = next(fields for name, fields, _, _ in CASES if name == scorer)
    cut = Answer(right.final, right.calls, truncated=True)
    assert verdict(scorer, fields, cut) == TRUNCATED
    assert verdict(scorer, fields, Answer(None)) == NO_ANSWER


def test_a_checker_that_crashes_is_no_pass():
    assert verdict("number", {"answer": "no number"}, Answer("18")) == SCORER_ERROR


def test_every_canonical_solution_of_humaneval_passes():
    items = load_items(load_benchmark("humaneval"), None).items
    assert len(items) == 164
    for item in items:
        code = f"```python\n{item.fields['prompt']}{item.fields['canonical_solution']}\n```"
        assert verdict("program", item.fields, Answer(code)) == RIGHT, item.id


def test_every_answer_of_bfcl_is_right():
    items = load_items(load_benchmark("bfcl"), None).items
    assert len(items) == 400
    for item in items:
        ((name, accepted),) = item.fields["ground_truth"][0].items()
        required = item.fields["function"][0]["parameters"]["required"]
        arguments = {
            key: first(values)
            for key, values in accepted.items()
            if values[0] != "" or key in required
        }
        assert verdict("call", item.fields, Answer(None, [(name, arguments)])) == RIGHT, item.id


def first(values):
    """The first accepted value that is not left out, with those inside it."""
    value = next(value for value in values if value != "")
    if isinstance(value, dict):
        return {k: first(v) for k, v in value.items() if v[0] != ""}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [first([inner]) for inner in value]
    return value
