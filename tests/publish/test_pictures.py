"""Pictures of the card: drawn where matplotlib is, and shown by the card."""

import json
from dataclasses import replace
from io import BytesIO

import pytest

from quantkit.artifacts.fidelity import Interval
from quantkit.artifacts.report import Report, SizePoint
from quantkit.artifacts.scores import VERDICTS, Difference, Score
from quantkit.publish import pictures as module
from quantkit.publish.pictures import pictures
from quantkit.publish.record import documents, read_report

AGAINST = Difference("native", 0.5, Interval(0.1, -0.1, 0.3), 2, 1, 1.0, 0.6)
SCORE = Score(
    "gsm8k",
    "GSM8K",
    10,
    False,
    Interval(0.6, 0.3, 0.8),
    dict.fromkeys(VERDICTS, 2),
    9.5,
    {},
    AGAINST,
)


@pytest.fixture(scope="module")
def report(quant):
    return read_report(quant)


def pixels(png):
    from matplotlib.image import imread

    return imread(BytesIO(png), format="png")


def test_a_repo_has_its_tier_map(quant):
    assert "![Bits per weight by role and layer](tiers.png)" in (quant / "README.md").read_text()
    drawn = pixels((quant / "tiers.png").read_bytes())
    assert drawn[:4, :4, :3].min() == 1  # white, on dark pages, too
    assert len({tuple(p) for p in drawn.reshape(-1, drawn.shape[-1])[::7].tolist()}) > 5


def test_scores_are_drawn(report):
    scored = replace(report, scores=(SCORE, replace(SCORE, benchmark="mmlu", against=None)))
    drawn = documents(scored)
    assert set(pictures(scored)) == {"tiers.png", "scores.png"} <= set(drawn)
    assert "![Accuracy on benchmarks](scores.png)" in drawn["README.md"]
    assert pixels(drawn["scores.png"]).std() > 0


def test_kl_against_size(report):
    """The best plans, recipes, and this quant: predicted, and measured where it is."""
    points = (SizePoint(None, 10**8, 0.5), SizePoint(None, 2 * 10**8, 0.1))
    recipe = SizePoint("uniform-4", 10**8, 0.8)
    known = replace(report, frontier=(*points, recipe))
    drawn = documents(known)
    assert "![KL divergence against size](frontier.png)" in drawn["README.md"]
    assert pixels(drawn["frontier.png"]).std() > 0
    assert drawn["frontier.png"] != pictures(replace(known, frontier=points))["frontier.png"]
    again = Report.from_json(json.loads(drawn["quantkit.json"]), "report")
    assert again.frontier == known.frontier


def test_equal_reports_give_equal_pictures(report):
    assert pictures(report) == pictures(report)


def test_without_matplotlib_the_card_has_none(report, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    drawn = documents(report)
    assert "tiers.png" not in drawn
    assert "tiers.png" not in drawn["README.md"]
