"""Evaluation on a tiny gpt-oss that babbles: records, resuming, comparing."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from quantkit.artifacts.scores import VERDICTS
from quantkit.errors import InputError
from quantkit.evaluation import official
from quantkit.jobs.evaluate import EvaluationRequest, EvaluationSettings, evaluate
from quantkit.publish.record import read_report
from tests.support import standin

BENCHMARKS = ("gsm8k", "bfcl", "humaneval")
TIMES = ("seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return standin.write_own(tmp_path_factory.mktemp("model") / "gpt-oss")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(12)]
    (folder / "gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    question = {"subject": "law", "choices": ["1", "2", "3", "4"], "answer": 1}
    rows = [{**question, "question": f"What is {i}?"} for i in range(8)]
    for name in ("test", "dev"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"mmlu_{name}.jsonl").write_text(text)
    return folder


@pytest.fixture
def asked(data, tmp_path):
    """A request for a few items."""

    def request(*benchmarks, limit=4, **options):
        settings = EvaluationSettings(max_tokens=options.pop("max_tokens", 64), effort="low")
        return EvaluationRequest(
            benchmarks or BENCHMARKS, limit, data, tmp_path / "results", settings, **options
        )

    return request


def without_times(rows):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def test_every_answer_has_a_verdict_and_a_record(model, asked, tmp_path):
    for one in evaluate(str(model), asked()):
        assert one.score.items == 4
        assert not one.score.whole
        assert sum(one.score.verdicts.values()) == 4
        assert set(one.score.verdicts) == set(VERDICTS)
        assert [row["verdict"] in VERDICTS for row in one.records] == [True] * 4
        assert all("<|start|>" in row["prompt"] for row in one.records)
    assert len(list((tmp_path / "results").glob("*.jsonl"))) == len(BENCHMARKS)


def test_a_finished_run_is_not_run_again(model, asked, monkeypatch):
    first = evaluate(str(model), asked())
    monkeypatch.setattr("quantkit.jobs.evaluate.BatchModel", None)  # loading it would fail
    again = evaluate(str(model), asked())
    assert [one.records for one in again] == [one.records for one in first]


def test_more_items_keep_the_answers_to_fewer(model, asked):
    (few,) = evaluate(str(model), asked("gsm8k", limit=3))
    (more,) = evaluate(str(model), asked("gsm8k", limit=6))
    rows = {row["id"]: row for row in more.records}
    assert len(rows) == 6
    assert all(rows[row["id"]] == row for row in few.records)


def test_batches_do_not_change_answers(model, asked, tmp_path):
    one_by_one = evaluate(str(model), asked("gsm8k", "mmlu", batch=1))
    request = EvaluationRequest(**{**vars(asked("gsm8k", "mmlu", batch=4)), "results": tmp_path})
    together = evaluate(str(model), request)
    for a, b in zip(one_by_one, together, strict=True):
        assert without_times(a.records) == without_times(b.records)


def test_a_model_against_itself_never_flips(model, asked):
    for one in evaluate(str(model), asked("gsm8k", "mmlu"), against=str(model)):
        assert (one.score.against.won, one.score.against.lost) == (0, 0)
        assert one.score.against.difference.value == 0


def test_letters_are_chosen_without_reasoning(model, asked):
    (one,) = evaluate(str(model), asked("mmlu", limit=None))
    assert one.score.whole
    assert all(row["final"] in "ABCD" for row in one.records)
    assert all(row["prompt"].endswith("<|channel|>final<|message|>") for row in one.records)


RUN = """
import sys
from pathlib import Path
from quantkit.jobs.evaluate import EvaluationRequest, EvaluationSettings, evaluate
model, data, results = sys.argv[1:]
settings = EvaluationSettings(max_tokens=64, effort="low")
evaluate(model, EvaluationRequest(["gsm8k"], None, Path(data), Path(results), settings, batch=1))
"""


def test_a_killed_run_goes_on(model, data, tmp_path):
    def run(results):
        command = [sys.executable, "-c", RUN, str(model), str(data), str(results)]
        return subprocess.Popen(command, env={**os.environ})

    process = run(tmp_path / "killed")
    lines = 0
    while process.poll() is None and lines < 4:
        time.sleep(0.02)
        lines = sum(len(p.read_bytes().splitlines()) for p in (tmp_path / "killed").glob("*.jsonl"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    (path,) = (tmp_path / "killed").glob("*.jsonl")
    assert 1 < len(path.read_text().splitlines()) < 13
    with open(path, "a") as file:
        file.write('{"id": "torn')
    for results in ("killed", "whole"):
        process = run(tmp_path / results)
        assert process.wait() == 0
    found = [
        [json.loads(line) for line in (tmp_path / name / path.name).read_text().splitlines()]
        for name in ("killed", "whole")
    ]
    assert len(found[0]) == 13
    assert without_times(found[0]) == without_times(found[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 8}, "`max_tokens` 8: too few for reasoning and an answer"),
        ({"limit": 0}, "`limit` must be 1 or more"),
    ],
)
def test_refusals(model, asked, options, message):
    with pytest.raises(InputError, match=message):
        evaluate(str(model), asked("gsm8k", **options))


def test_not_a_model(asked, tmp_path):
    with pytest.raises(InputError, match="not a model"):
        evaluate(str(tmp_path), asked("gsm8k"))


@pytest.mark.parametrize(("benchmark", "checkers"), [("ifeval", "lm-eval"), ("bfcl", "bfcl-eval")])
def test_missing_checkers_are_noticed_first(model, asked, monkeypatch, benchmark, checkers):
    monkeypatch.setattr("quantkit.jobs.evaluate.BatchModel", None)  # loading would fail
    monkeypatch.setattr("quantkit.jobs.evaluate._file_hashes", None)
    monkeypatch.setattr(official, "find_spec", lambda package: None)
    official._ifeval.cache_clear()
    official._bfcl.cache_clear()
    with pytest.raises(InputError, match=f"the checkers of {checkers} are not installed"):
        evaluate(str(model), asked("gsm8k", benchmark))


def test_scores_enter_report_and_card(cli, model, data, tmp_path):
    repo = tmp_path / "repo"
    assert cli("quantize", model, "-o", repo, "-r", "mxfp4-q8").exit_code == 0
    options = ("--bench", "mmlu", "--data", data, "--limit", 3, "--results", tmp_path / "results")
    result = cli("eval", repo, *options, "--against", model, "--record")
    assert result.exit_code == 0, result.output
    (score,) = read_report(repo).scores
    assert score.items == 3
    card = (repo / "README.md").read_text()
    assert "| MMLU | 3, a sample |" in card
    assert score.command in card
    assert score.command.startswith("quantkit eval repo --bench mmlu")
    assert cli("verify", repo).exit_code == 0
    shown = cli("eval", repo, *options, "--show").output
    assert shown.count("--- MMLU, item") == 3 - score.verdicts["right"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bench", "mmmlu"), "unknown --bench"),
        (("--bench", "gsm8k", "--max-tokens", 8), "--max-tokens 8: too few"),
        (("--bench", "gsm8k", "--reasoning", "hard"), "unknown --reasoning effort 'hard'"),
        (("--bench", "gsm8k", "--record"), "quantkit did not write this repo"),
    ],
)
def test_bad_input_is_one_line(cli, model, data, tmp_path, options, message):
    result = cli("eval", model, "--data", data, "--results", tmp_path / "results", *options)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("\n") == 1
