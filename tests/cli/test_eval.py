"""`quantkit eval`: scores that are recorded."""

import shutil

from quantkit.artifacts.fidelity import Interval
from quantkit.artifacts.scores import VERDICTS, Score
from quantkit.jobs.evaluate import EvaluatedBenchmark
from quantkit.publish.record import read_report, record


def score(benchmark):
    verdicts = dict.fromkeys(VERDICTS, 1)
    return Score(benchmark, benchmark, 5, False, Interval(0.2, 0.1, 0.4), verdicts, 9.0, {})


def test_scores_recorded_during_a_run_stay(cli, quant, tmp_path, monkeypatch):
    repo = shutil.copytree(quant, tmp_path / "repo")

    def evaluate(*arguments, **options):
        record(repo, scores=(score("gsm8k"),))  # as a second run does
        return [EvaluatedBenchmark(score("mmlu"), [])]

    monkeypatch.setattr("quantkit.jobs.evaluate.evaluate", evaluate)
    result = cli("eval", repo, "--bench", "mmlu", "--record")
    assert result.exit_code == 0, result.output
    assert [one.benchmark for one in read_report(repo).scores] == ["gsm8k", "mmlu"]
