"""Benchmarks as data: definitions, items, samples."""

import json
import os
import subprocess
import sys

import pytest

from quantkit.errors import InputError
from quantkit.evaluation.benchmarks import (
    benchmark_names,
    load_benchmark,
    load_items,
    sample,
)
from quantkit.evaluation.scorers import SCORERS
from tests.support.hub import hub_environment, serving

MMLU = {"question": "One?", "choices": ["a", "b", "c", "d"], "answer": 1}


@pytest.fixture
def data(tmp_path):
    """A folder with a small MMLU."""
    subjects = ["law", "art", "law", "art", "law"]
    rows = [{**MMLU, "subject": s, "question": f"{s} {i}?"} for i, s in enumerate(subjects)]
    for name, some in (("mmlu_test", rows), ("mmlu_dev", rows[:2])):
        lines = "".join(json.dumps(row) + "\n" for row in some)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    return tmp_path


def test_all_definitions_are_whole():
    names = benchmark_names()
    assert {"mmlu", "gsm8k", "ifeval", "bfcl", "humaneval", "hashhop"} < set(names)
    for name in names:
        benchmark = load_benchmark(name)
        assert benchmark.scorer in SCORERS
        assert benchmark.hub is None or len(benchmark.revision) == 40
        assert benchmark.hub or benchmark.package or benchmark.generator


def test_examples_are_of_the_same_subject(data):
    items = load_items(load_benchmark("mmlu"), data).items
    assert items[1].prompt == (
        "The following are multiple choice questions (with answers) about art.\n\n"
        "art 1?\nA. a\nB. b\nC. c\nD. d\nAnswer: B\n\n"
        "art 1?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    )


def test_a_sample_is_even_and_fixed(data):
    items = load_items(load_benchmark("mmlu"), data).items
    two = sample(items, 2)
    assert sorted(item.group for item in two) == ["art", "law"]
    assert {item.id for item in two} < {item.id for item in sample(items, 4)}
    assert sample(items, 99) == items


def test_hash_chains_can_be_followed():
    items = load_items(load_benchmark("hashhop"), None).items
    assert {item.fields["hops"] for item in items} == {1, 2, 3, 4}
    for item in items[:8]:
        after = dict(line.split(" = ") for line in item.fields["lines"].split("\n"))
        value, hops = after[item.fields["query"]], 1
        while not value.startswith("'"):
            value, hops = after[value], hops + 1
        assert (value.strip("'"), hops) == (item.fields["answer"], item.fields["hops"])
        assert 12_000 <= len(item.fields["lines"]) < 12_500


def test_unknown_benchmark():
    with pytest.raises(InputError, match="unknown `bench` 'mmmlu'. Use .*mmlu"):
        load_benchmark("mmmlu")


def test_a_definition_extends_a_shipped_one(tmp_path):
    raw, mmlu = load_benchmark("mmlu-raw"), load_benchmark("mmlu")
    assert (raw.template, raw.shots, raw.revision) == (mmlu.template, mmlu.shots, mmlu.revision)
    assert (raw.raw, mmlu.raw) == (True, False)
    own = tmp_path / "own.toml"
    own.write_text('extends = "gsm8k"\ntemplate = "{question} Think."\n')
    assert load_benchmark(str(own)).template == "{question} Think."
    assert load_benchmark(str(own)).scorer == "number"
    own.write_text('extends = "gsm9k"\n')
    with pytest.raises(InputError, match="extends 'gsm9k', which is not a shipped benchmark"):
        load_benchmark(str(own))


def test_missing_data(tmp_path):
    with pytest.raises(InputError, match=r"has no gsm8k_test.jsonl, the items of GSM8K"):
        load_items(load_benchmark("gsm8k"), tmp_path)


def test_a_broken_line_is_named(data):
    with open(data / "mmlu_test.jsonl", "a") as file:
        file.write("{broken\n")
    with pytest.raises(InputError, match=r"mmlu_test.jsonl, line 6: not JSON"):
        load_items(load_benchmark("mmlu"), data)


def test_fields_that_do_not_fit(data):
    (data / "mmlu_test.jsonl").write_text('{"question": "One?"}\n')
    with pytest.raises(InputError, match="MMLU, item 1: its fields do not fit the template"):
        load_items(load_benchmark("mmlu"), data)


def test_no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"cannot be loaded from the Hub .* Give a folder with"):
        load_items(load_benchmark("gsm8k"), None)


def test_an_unknown_key_of_a_definition(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('title = "Mine"\ncolour = "red"\n')
    with pytest.raises(InputError, match="mine.toml: not the definition of a benchmark"):
        load_benchmark(str(path))


def test_items_of_the_hub_have_their_pinned_revision(tmp_path):
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    files = "- config_name: main\n  data_files:\n  - {split: test, path: test.jsonl}\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    rows = [{"question": f"How much is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(3)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = (
        "from quantkit.evaluation.benchmarks import load_benchmark, load_items\n"
        "for item in load_items(load_benchmark('gsm8k'), None).items:\n"
        "    print(item.id, item.fields['question'], item.fields['answer'])\n"
    )
    with serving({"openai/gsm8k": folder}) as (endpoint, log):
        ran = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **hub_environment(endpoint, tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
    assert ran.stdout.splitlines() == [f"{i} How much is {i} + {i}? #### {2 * i}" for i in range(3)]
    pinned = f"/datasets/openai/gsm8k/resolve/{load_benchmark('gsm8k').revision}/README.md"
    assert pinned in [path for _, path, _ in log]
