"""The main job on the tiny gpt-oss: profile, plan, refine, write, compare."""

import json
from importlib.metadata import version

import numpy as np
import pytest

import quantkit
from quantkit.backend import mx
from quantkit.calibration.calibration_set import read_calibration_set
from quantkit.calibration.splits import VALIDATE
from quantkit.evaluation.fidelity import prepare
from quantkit.quantizers.layerwise import changed_tiers
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.measure_kl import measure_kl
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
    settings = quantkit.ProfileSettings(request, ("q8g64", "q4g64", "q3g64", "q2g64"))
    return out, quantkit.profile(source, out, settings)


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
        (("-b", "4bpw", "--pin", "expert=q8g64"), "is not in the profile"),
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
    limits = quantkit.Budget(source.inventory.parameters * 35 // 80)
    plan = quantkit.plan_by_budget(source.inventory, profile, limits, quantkit.Constraints())
    out = tmp_path / "out"
    quantkit.write_plan(source, plan, out)
    text = words(tmp_path / "text.txt", 2)
    request = quantkit.CalibrationSpec(text, tokens=512, sequence_length=64)
    tokens = mx.array(prepare(source, [], request).text.tokens)
    wanted = [changed_tiers(source, plan), {}, changed_tiers(source, plan, "embedding")]
    whole, nothing, embedding = measure_kl(StreamingModel(source), tokens, wanted, lambda _: None)  # fmt: skip
    (found,) = quantkit.compare(source, [str(out)], request)
    assert whole.mean() == pytest.approx(found.kl_mean.value, rel=1e-3)
    assert np.all(nothing == 0)
    assert 0 <= embedding.mean() < whole.mean()


def test_refined_plans_are_measured_and_the_best_wins(cli, source, profiled, checkpoint, tmp_path):
    folder, profile = profiled
    limits = quantkit.Budget(source.inventory.parameters * 4 // 8, label="4bpw")
    measured_plans = quantkit.refine(source, profile, limits, quantkit.Constraints(), rounds=2)
    plan = measured_plans[0].plan
    assert len(measured_plans) >= 2
    assert [text.name for text in plan.calibration_texts] == ["text.txt", "default"]
    assert plan.measured_kl == min(measured_plan.kl for measured_plan in measured_plans)
    assert all(measured_plan.plan.total_bytes <= limits.bytes for measured_plan in measured_plans)
    spec = quantkit.CalibrationSpec(tokens=2048)
    text = mx.array(read_calibration_set(source.checkpoint, spec, VALIDATE).tokens)
    (again,) = measure_kl(
        StreamingModel(source), text, [changed_tiers(source, plan)], lambda _: None
    )
    assert plan.measured_kl == pytest.approx(float(again.mean()), rel=1e-5)
    path = tmp_path / "plan.json"
    result = cli("plan", checkpoint, "--profile", folder, "-b", "4bpw", "--refine", 1, "-o", path)
    assert result.exit_code == 0, result.output
    assert "measured" in result.stdout
    assert json.loads(path.read_text())["measured_kl"] > 0


def test_refining_needs_a_budget(cli, checkpoint, profiled):
    result = cli("plan", checkpoint, "--profile", profiled[0], "-r", "mxfp4-q8", "--refine", 1)
    assert result.exit_code == 2
    assert "--refine needs a --budget" in result.stderr


def test_python_writes_what_the_command_writes(cli, checkpoint, tmp_path):
    """A budget, a profile that is made first, gptq and tuning: the same bytes in every file."""
    text = words(tmp_path / "text.txt", 5)
    result = cli(
        *("quantize", checkpoint, "-b", "4.5bpw", "-o", tmp_path / "command"),
        *("--calibration", text, "--tokens", 512, "--quantizer-tokens", 2048, "--tune", 2),
    )
    assert result.exit_code == 0, result.output
    options = quantkit.QuantizeOptions(
        profile_text=quantkit.CalibrationSpec(text, tokens=512),
        quantizer_text=quantkit.CalibrationSpec(text),
        quantizer_tokens=2048,
        tuning_steps=2,
        command=quantkit.read_report(tmp_path / "command").command,
    )
    request = quantkit.PlanRequest(budget="4.5bpw")
    outcome = quantkit.quantize(str(checkpoint), tmp_path / "python", request, options)
    assert not outcome.complete
    for suffix in ("", "-profile"):
        ours, theirs = (tmp_path / f"{name}{suffix}" for name in ("python", "command"))
        names = sorted(path.name for path in theirs.iterdir())
        assert sorted(path.name for path in ours.iterdir()) == names
        for name in set(names) - {"run.json"}:  # which says how long the profile took
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    again = quantkit.quantize(str(checkpoint), tmp_path / "python", request, options)
    assert again.complete


def test_a_plan_carries_its_memory_target(cli, checkpoint, profiled, tmp_path):
    """The card of a saved plan states the context that the plan was made for, and no other."""
    folder, _ = profiled
    path = tmp_path / "plan.json"
    options = ("--profile", folder, "-b", "mac:8GB", "--context", "32k", "--reserve", "2GB")
    assert cli("plan", checkpoint, *options, "-o", path).exit_code == 0
    target = {"mac_gib": 8, "context": 32768, "reserve": 2_000_000_000}
    assert json.loads(path.read_text())["memory_target"] == target
    command = ("quantize", checkpoint, "--plan", path, "-o", tmp_path / "out")
    refused = cli(*command, "--context", "4k")
    assert refused.exit_code == 2
    assert "--context and --reserve are part of the --plan" in refused.stderr
    result = cli(*command, *SHORT, "--quantizer-tokens", 512)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert report["memory"]["context"] == 32768
    assert report["memory"]["reserve_bytes"] == 2_000_000_000
    card = (tmp_path / "out" / "README.md").read_text()
    assert "32768 tokens" in card
    assert "8192" not in card


def test_every_stage_reports_all_of_its_work(checkpoint, tmp_path):
    """Layers, tuning steps and bytes: each bar ends at its total."""
    totals, done = {}, {}

    class Recorder(quantkit.Progress):
        def stage(self, title, total, unit="bytes"):
            totals[title], done[title] = total, 0

            def advance(more, name):
                done[title] += more

            return advance

    options = quantkit.QuantizeOptions(
        quantizer_text=quantkit.CalibrationSpec(words(tmp_path / "text.txt", 6)),
        quantizer_tokens=1024,
        tuning_steps=2,
    )
    request = quantkit.PlanRequest(recipe="uniform-4", quantizer="gptq")
    quantkit.quantize(str(checkpoint), tmp_path / "out", request, options, progress=Recorder())
    assert set(totals) == {"Quantizing", "Tuning scales", "Writing out"}
    assert done == totals


def test_less_memory_gives_the_same_plan(cli, checkpoint, profiled, tmp_path):
    """Smaller pieces of work change sums by rounding only."""
    text = words(tmp_path / "text.txt", 1)
    options = ("--calibration", text, "--tokens", 512, "--tiers", "q4g64", "--memory", "300MB")
    result = cli("profile", checkpoint, "-o", tmp_path / "p", *options)
    assert result.exit_code == 0, result.output
    small = quantkit.load_profile(
        str(tmp_path / "p"), quantkit.open_source(str(checkpoint)).inventory
    )
    _, whole = profiled
    expected = {w.name: w.by_tier for w in whole.weights}
    compared = 0
    for weight in small.weights:
        for cost in weight.costs:
            if cost.tier == "q4g64":
                assert cost.kl == pytest.approx(expected[weight.name]["q4g64"].kl, rel=1e-3)
                compared += 1
    assert compared > 20
    for memory, says in (("lots", "not a number"), ("0", "at least 250 MB"), ("9MB", "--memory")):
        bad = cli("profile", checkpoint, "-o", tmp_path / "q", "--memory", memory)
        assert bad.exit_code == 2
        assert bad.stderr.count("\n") == 1
        assert says in bad.stderr


def test_python_writes_the_demo_as_the_command_does(cli, demo, tmp_path):
    """The main job on the demo model, by a budget: the same repo, byte for byte."""
    few = ("--tokens", 64, "--sequence-length", 32, "--tiers", "q6g64,q3g64")
    assert cli("profile", demo, "-o", tmp_path / "p", *few).exit_code == 0
    options = ("--profile", tmp_path / "p", "-b", "4.5bpw", "--quantizer", "rtn")
    result = cli("quantize", demo, *options, "-o", tmp_path / "command")
    assert result.exit_code == 0, result.output
    command = quantkit.read_report(tmp_path / "command").command
    request = quantkit.PlanRequest(budget="4.5bpw", profile=str(tmp_path / "p"), quantizer="rtn")
    options = quantkit.QuantizeOptions(command=command)
    quantkit.quantize(str(demo), tmp_path / "python", request, options)
    names = {path.name for path in (tmp_path / "command").iterdir()}
    assert names == {path.name for path in (tmp_path / "python").iterdir()}
    assert "quantkit.json" in names
    for name in names:
        ours, theirs = (tmp_path / folder / name for folder in ("python", "command"))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_a_resumed_run_is_noted(checkpoint, tmp_path):
    """At its start, and in the outcome; nothing is said of a run that was not interrupted."""
    notes = []

    class Interrupting(quantkit.Progress):
        def __init__(self, after):
            self.left = after

        def stage(self, title, total, unit="bytes"):
            def advance(more, name):
                self.left -= 1
                if self.left == 0:
                    raise KeyboardInterrupt

            return advance

        def note(self, text):
            notes.append(text)

    request = quantkit.PlanRequest(recipe="uniform-4")
    options = quantkit.QuantizeOptions(shard_bytes=200_000)
    arguments = (str(checkpoint), tmp_path / "out", request, options)
    with pytest.raises(KeyboardInterrupt):
        quantkit.quantize(*arguments, progress=Interrupting(60))
    assert notes == []
    outcome = quantkit.quantize(*arguments, progress=Interrupting(-1))
    assert outcome.resumed
    assert len(notes) == 1
    assert notes[0].startswith("resuming the interrupted run in")
