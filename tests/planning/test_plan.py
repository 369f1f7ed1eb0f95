import json
import re

import pytest

from quantkit.artifacts.plan import Plan
from quantkit.checkpoint.source import open_source
from quantkit.errors import PlanError, TierError
from quantkit.planning.plan import read_plan
from quantkit.planning.recipe import load_recipe, plan_by_recipe
from tests.support import tiny


@pytest.fixture
def inventory(checkpoint):
    return open_source(str(checkpoint)).inventory


@pytest.fixture
def saved(inventory):
    """A plan as its file holds it."""
    plan = plan_by_recipe(inventory, load_recipe("mxfp4-q8"))
    return json.loads(json.dumps(plan.to_json()))


def test_a_plan_reads_back_as_it_was(inventory, saved):
    again = read_plan(saved, inventory, "plan.json")
    assert json.loads(json.dumps(again.to_json())) == saved
    assert Plan.from_json(saved, "plan.json") == again


def test_an_edited_plan_is_counted_anew(inventory, saved):
    before = saved["total_bytes"]
    entry = next(w for w in saved["weights"] if w["name"] == "lm_head")
    entry["tier"] = "q4g64"
    plan = read_plan(saved, inventory, "plan.json")
    assert plan.total_bytes == before - 64 * 128 * 4 // 8
    assert plan.origin == "edited from recipe mxfp4-q8"
    again = json.loads(json.dumps(plan.to_json()))
    assert read_plan(again, inventory, "plan.json").origin == plan.origin


def test_a_plan_of_another_checkpoint(tmp_path, saved):
    other = tiny.write_gpt_oss(tmp_path / "other", config={**tiny.CONFIG, "rope_theta": 7})
    with pytest.raises(PlanError, match=r"plan.json: made for another checkpoint \(.*tiny-gpt-oss"):
        read_plan(saved, open_source(str(other)).inventory, "plan.json")


def edit(key, value):
    return lambda data: data.update({key: value})


BAD = {
    "not a plan": (edit("kind", "report"), PlanError, "expected a quantkit plan, found 'report'"),
    "old version": (edit("version", 0), PlanError, "plan of version 0, this quantkit reads 3"),
    "no weights": (lambda d: d.pop("weights"), PlanError, "not a complete plan"),
    "weight lost": (lambda d: d["weights"].pop(), PlanError, "'lm_head' has no tier"),
    "norms in a tier": (
        lambda d: d["unquantized"].update(tier="q8g64"), PlanError, "never quantized",
    ),
    "weight twice": (
        lambda d: d["weights"].append(d["weights"][0]), PlanError, "names a weight twice",
    ),
    "weight invented": (
        lambda d: d["weights"].append({**d["weights"][0], "name": "x"}), PlanError, "'x' is unknown",
    ),
    "no such tier": (
        lambda d: d["weights"][0].update(tier="q9g64"), TierError, "unknown tier 'q9g64'",
    ),
    "tier that does not fit": (
        lambda d: next(w for w in d["weights"] if w["role"] == "expert_down").update(tier="q4g128"),
        TierError, "does not fit",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_plan_file(inventory, saved, case):
    change, error, message = BAD[case]
    change(saved)
    with pytest.raises(error, match=message):
        read_plan(saved, inventory, "plan.json")


def test_an_edited_plan_is_not_compared(cli, checkpoint, tmp_path):
    """Its bytes are those of the plan before the edit."""
    path, again = tmp_path / "plan.json", tmp_path / "again.json"
    assert cli("plan", checkpoint, "-r", "uniform-4", "-o", path).exit_code == 0
    data = json.loads(path.read_text())
    data["weights"][3]["tier"] = "q2g32"
    path.write_text(json.dumps(data))
    refused = cli("diff", path, path)
    assert refused.exit_code == 2
    assert "was edited. Count its bytes again first: quantkit plan SRC --plan" in refused.stderr
    saved = cli("plan", checkpoint, "--plan", path, "-o", again)
    assert f"Saved to {again}." in saved.stdout
    assert "0 weights differ" in cli("diff", again, again).stdout


@pytest.mark.parametrize("value", [None, 3, [], {"weights": 3}, {"weights": [3]}])
def test_malformed_plans_show_no_python(cli, checkpoint, tmp_path, value):
    path = tmp_path / "plan.json"
    assert cli("plan", checkpoint, "-r", "uniform-4", "-o", path).exit_code == 0
    data = json.loads(path.read_text())
    if isinstance(value, dict):
        data.update(value)
    else:
        data["weights"][0]["tier"] = value
    path.write_text(json.dumps(data))
    for command in (("plan", checkpoint, "--plan", path), ("diff", path, path)):
        result = cli(*command)
        assert result.exit_code == 2
        assert str(path) in result.stderr
        assert not re.search("object|argument|NoneType|attribute", result.stderr), result.stderr
