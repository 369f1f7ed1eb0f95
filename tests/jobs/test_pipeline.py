"""The stages put together, on the tiny gpt-oss: profile, plan, refine, write, judge."""

import json
from importlib.metadata import version

import numpy as np
import pytest

import quantkit
from quantkit.backend import mx
from quantkit.calibration.text import read_text
from quantkit.evaluation.fidelity import prepare
from quantkit.jobs.pipeline import changes
from quantkit.streaming import measure_kl as joint
from quantkit.streaming.layer_runner import StreamingModel
from tests.support.text import words

pytestmark = pytest.mark.skipif(
    version("mlx-lm").startswith("0.31"), reason="mlx-lm differentiates its expert indices there"
)

SHORT = ("--tokens", 512)


@pytest.fixture(scope="module")
def source(checkpoint):
    return quantkit.open_source(str(checkpoint))


@pytest.fixture(scope="module")
def profiled(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    out, request = folder / "p", quantkit.CalibrationSpec(words(folder / "text.txt", 1), tokens=512)
    settings = quantkit.Settings(request, ("q8g64", "q4g64", "q3g64", "q2g64"))
    return out, quantkit.make_profile(source, out, settings)


def test_a_budget_alone_is_enough(cli, checkpoint, tmp_path):
    """The profile is made first, beside the repo, and serves the next budget."""
    result = cli("quantize", checkpoint, "-b", "4.5bpw", "-o", tmp_path / "out", *SHORT)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-profile"]
    report = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    budget = int(4.5 * report["parameters"] / 8)
    assert 0.98 * budget < report["total_bytes"] <= budget
    assert cli("verify", tmp_path / "out").exit_code == 0
    made = (tmp_path / "out-profile" / "profile.json").stat().st_mtime_ns
    options = ("-b", "5bpw", "--force", "-o", tmp_path / "out", *SHORT)
    assert cli("quantize", checkpoint, *options).exit_code == 0
    assert (tmp_path / "out-profile" / "profile.json").stat().st_mtime_ns == made


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("-b", "5parsec"), "not understood"),
        (("-b", "1bpw"), "not possible"),
        (("-b", "4bpw", "--pin", "lm_head=q6g128"), ""),
        (("-b", "4bpw", "--pin", "expert=q8g64"), "knows no loss"),
    ],
)
def test_what_is_impossible_is_said_before_the_work(cli, checkpoint, tmp_path, options, says, monkeypatch):  # fmt: skip
    def work(*_):
        raise AssertionError("profiled")

    if says:
        monkeypatch.setattr("quantkit.sensitivity.measure.make", work)
    result = cli("quantize", checkpoint, *options, *SHORT, "-o", tmp_path / "out")
    assert result.exit_code == (2 if says else 0), result.output
    assert says in result.stderr
    assert says == "" or list(tmp_path.iterdir()) == []


def test_an_output_that_is_taken_is_said_before_the_work(cli, checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    result = cli("quantize", checkpoint, "-b", "4bpw", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_plans_measured_together_are_what_the_judge_finds(source, profiled, cli, checkpoint, tmp_path):  # fmt: skip
    """KL of whole plans, embedding and head included, against the written repo's."""
    _, profile = profiled
    limits = quantkit.Limits(source.inventory.parameters * 35 // 80)
    plan = quantkit.plan_by_budget(source.inventory, profile, limits, quantkit.Constraints())
    out = tmp_path / "out"
    quantkit.quantize(source, plan, out)
    text = words(tmp_path / "text.txt", 2)
    request = quantkit.CalibrationSpec(text, tokens=512, sequence_length=64)
    tokens = mx.array(prepare(source, [], request).text.tokens)
    wanted = [changes(source, plan), {}, changes(source, plan, "embedding")]
    whole, nothing, embedding = joint.measured(StreamingModel(source), tokens, wanted, lambda _: None)  # fmt: skip
    (found,) = quantkit.compare(source, [str(out)], request)
    assert whole.mean() == pytest.approx(found.kl_mean.value, rel=1e-3)
    assert np.all(nothing == 0)
    assert 0 <= embedding.mean() < whole.mean()


def test_refined_plans_are_measured_and_the_best_wins(cli, source, profiled, checkpoint, tmp_path):
    folder, profile = profiled
    limits = quantkit.Limits(source.inventory.parameters * 4 // 8, about="4bpw")
    measured_plans = quantkit.refine(
        source, profile, limits, quantkit.Constraints(), rounds=2, tokens=512
    )
    plan = measured_plans[0].plan
    assert len(measured_plans) >= 2
    assert [text.name for text in plan.calibration_texts] == ["text.txt", "default"]
    assert plan.measured_kl == min(measured_plan.kl for measured_plan in measured_plans)
    assert all(measured_plan.plan.total_bytes <= limits.bytes for measured_plan in measured_plans)
    text = mx.array(read_text(source.checkpoint, quantkit.CalibrationSpec(tokens=512)).tokens)
    (again,) = joint.measured(StreamingModel(source), text, [changes(source, plan)], lambda _: None)
    assert plan.measured_kl == pytest.approx(float(again.mean()), rel=1e-5)
    path = tmp_path / "plan.json"
    result = cli("plan", checkpoint, "--profile", folder, "-b", "4bpw", "--refine", 1, "-o", path)
    assert result.exit_code == 0, result.output
    assert "measured" in result.stdout
    assert json.loads(path.read_text())["measured_kl"] > 0


def test_refining_needs_a_budget(cli, checkpoint, profiled):
    result = cli("plan", checkpoint, "--profile", profiled[0], "-r", "mxfp4-q8", "--refine", 1)
    assert result.exit_code == 2
    assert "--refine goes with --budget" in result.stderr
