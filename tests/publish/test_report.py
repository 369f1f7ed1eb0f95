import json
import shutil

import pytest

from quantkit.allocate.recipe import load_recipe, plan_by_recipe
from quantkit.artifacts.report import Report
from quantkit.errors import OutputError, PlanError
from quantkit.pipeline import quantize
from quantkit.publish.card import card, license_of
from quantkit.publish.report import read_report
from quantkit.source.source import open_source


@pytest.fixture(scope="module")
def written(tmp_path_factory, checkpoint):
    source = open_source(str(checkpoint))
    plan = plan_by_recipe(source.inventory, load_recipe("moringlabs-3.6bit"))
    out = tmp_path_factory.mktemp("repo") / "out"
    return out, quantize(source, plan, out)


def test_it_reads_back(written):
    out, report = written
    value = json.loads((out / "quantkit.json").read_text())
    assert Report.from_json(value, "quantkit.json") == report
    assert json.loads(json.dumps(report.to_json())) == value


def test_what_it_says(written):
    _, report = written
    value = report.to_json()
    assert value["bits_per_weight"] == 8 * value["total_bytes"] / value["parameters"]
    assert value["total_gb"] == round(value["total_bytes"] / 1e9, 3)
    assert value["total_gib"] == round(value["total_bytes"] / 2**30, 3)
    assert {"quantkit", "mlx", "mlx-lm"} == value["versions"].keys()
    assert value["plan"]["origin"] == "recipe moringlabs-3.6bit"
    tiers = {row["tier"]: row for row in value["tiers"]}
    assert tiers["q3g64"]["roles"] == ("expert_gate", "expert_up", "expert_down")
    assert tiers["q3g64"]["bits_per_weight"] == 3.5
    assert tiers["bf16"]["roles"] == ("router",)
    assert sum(row["bytes"] for row in value["tiers"]) == value["total_bytes"]
    assert value["active_bytes_per_token"] < value["total_bytes"]


def edited(change):
    def edit(out):
        value = json.loads((out / "quantkit.json").read_text())
        change(value)
        (out / "quantkit.json").write_text(json.dumps(value))

    return edit


BAD = {
    "missing": (lambda o: (o / "quantkit.json").unlink(), OutputError, "has no quantkit.json"),
    "not JSON": (lambda o: (o / "quantkit.json").write_text("{"), OutputError, "not valid JSON"),
    "other kind": (edited(lambda v: v.update(kind="plan")), PlanError, "expected a quantkit report"),
    "other version": (edited(lambda v: v.update(version=99)), PlanError, "report of version 99"),
    "no weights": (edited(lambda v: v.pop("weights")), PlanError, "not a complete report"),
    "no shards": (edited(lambda v: v.pop("shards")), PlanError, "not a complete report"),
    "bytes as text": (
        edited(lambda v: v["weights"][0].update(bytes="many")), PlanError, "no whole number",
    ),
    "bytes beyond counting": (
        edited(lambda v: v["weights"][0].update(bytes=10**400)), PlanError, "no whole number",
    ),
    "active bytes as text": (
        edited(lambda v: v["weights"][0].update(active_bytes="")), PlanError, "no whole number",
    ),
    "hash is a number": (
        edited(lambda v: v["shards"][0].update(sha256=5)), PlanError, "not described rightly",
    ),
    "shard elsewhere": (
        edited(lambda v: v["shards"][0].update(name="../x")), PlanError, "'../x' is not described",
    ),
    "weights are a number": (edited(lambda v: v.update(weights=3)), PlanError, "not a complete"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_report(tmp_path, written, case):
    out = shutil.copytree(written[0], tmp_path / "out")
    change, error, message = BAD[case]
    change(out)
    with pytest.raises(error, match=message):
        read_report(out)


def test_card(written):
    _, report = written
    text = card(report, "openai/gpt-oss-20b", "apache-2.0")
    front = text.split("---\n")[1]
    assert front == (
        "library_name: mlx\npipeline_tag: text-generation\nlicense: apache-2.0\n"
        "base_model: openai/gpt-oss-20b\nbase_model_relation: quantized\n"
        "tags:\n- mlx\n- quantkit\n- gpt_oss\n"
    )
    assert f"{report.plan.bits_per_weight:.3f}" in text
    for row in report.plan.tiers():
        assert f"| {row.tier} |" in text


def test_card_of_a_local_folder_names_no_base_model(written):
    assert "base_model" not in card(written[1], None, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\ntags:\n- x\nlicense: mit\npipeline_tag: y\n---\n# Hello\n", "mit"),
        ("# No front matter\nlicense: gpl\n", None),
        ("---\nlicense: 'mit'\n---\n", "mit"),
        ("---\ntags: x\n---\ntext\nlicense: proprietary\n---\n", None),
        ("", None),
    ],
)
def test_license_of_the_source(tmp_path, text, expected):
    (tmp_path / "README.md").write_text(text)
    assert license_of(tmp_path) == expected
