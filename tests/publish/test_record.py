import hashlib
import json
import re
import shutil
from dataclasses import replace

import pytest

from quantkit.artifacts.fidelity import Fidelity, Interval
from quantkit.artifacts.report import License, Report
from quantkit.artifacts.speed import Run, Speed
from quantkit.checkpoint.source import open_source
from quantkit.errors import OutputError, PlanError
from quantkit.planning.recipe import load_recipe, plan_by_recipe
from quantkit.publish.card import card, license_of
from quantkit.publish.record import documents, read_report, record
from tests.support.repo import write_repo


@pytest.fixture(scope="module")
def written(tmp_path_factory, checkpoint):
    source = open_source(str(checkpoint))
    plan = plan_by_recipe(source.inventory, load_recipe("moringlabs-3.6bit"))
    out = tmp_path_factory.mktemp("repo") / "out"
    return out, write_repo(source, plan, out)


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
    "missing": (lambda o: (o / "quantkit.json").unlink(), OutputError, "quantkit.json is missing"),
    "not JSON": (lambda o: (o / "quantkit.json").write_text("{"), OutputError, "not valid JSON"),
    "other kind": (edited(lambda v: v.update(kind="plan")), PlanError, "expected a quantkit report"),
    "other version": (edited(lambda v: v.update(version=99)), PlanError, "report of version 99"),
    "no weights": (edited(lambda v: v.pop("weights")), PlanError, "not a complete report"),
    "no shards": (edited(lambda v: v.pop("shards")), PlanError, "not a complete report"),
    "bytes as text": (
        edited(lambda v: v["weights"][0].update(bytes="many")), PlanError, "not a whole number",
    ),
    "bytes beyond counting": (
        edited(lambda v: v["weights"][0].update(bytes=10**400)), PlanError, "not a whole number",
    ),
    "active bytes as text": (
        edited(lambda v: v["weights"][0].update(active_bytes="")), PlanError, "not a whole number",
    ),
    "hash is a number": (
        edited(lambda v: v["shards"][0].update(sha256=5)), PlanError, "malformed name, size or hash",
    ),
    "shard elsewhere": (
        edited(lambda v: v["shards"][0].update(name="../x")), PlanError, "'../x': malformed",
    ),
    "fidelity is a number": (edited(lambda v: v.update(fidelity=3)), PlanError, "not a complete"),
    "speed lacks its runs": (
        edited(lambda v: v.update(speed={"machine": "x", "versions": {}})), PlanError, "'runs'",
    ),
    "fidelity is empty": (edited(lambda v: v.update(fidelity={})), PlanError, "not a complete"),
    "memory as text": (
        edited(lambda v: v["memory"].update(needed_bytes="many")), PlanError, "not a whole number",
    ),
    "a base model that is a list": (
        edited(lambda v: v.update(base_model=["a/b"])), PlanError, "base_model is not text",
    ),
    "no version": (edited(lambda v: v["versions"].pop("quantkit")), PlanError, "'quantkit'"),
    "memory of other fields": (
        edited(lambda v: v.update(memory={"x": 1})), PlanError, "not a complete report",
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
    known = replace(report, base_model="openai/gpt-oss-20b", license=License("apache-2.0"))
    text = card(known)
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
    assert "base_model" not in card(written[1])


def numbers(value):
    """All numbers of a JSON value, in texts, too."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        return {number for one in value for number in numbers(one)}
    if isinstance(value, str):
        return {float(number) for number in re.findall(r"\d+(?:\.\d+)?", value)}
    return set() if value is None or isinstance(value, bool) else {float(value)}


def found(text, known):
    """Whether a number, rounded and in whichever unit, is one of those known."""
    digits = len(text.partition(".")[2])
    scales = (1, 1e3, 1e6, 1e9, 2**30)
    return any(f"{value / scale:.{digits}f}" == text for value in known for scale in scales) or any(
        f"{value:.4g}" == text for value in known
    )


INTERVAL = Interval(0.012345678, 0.0112, 0.01398765)
FIDELITY = Fidelity(
    "out", "tiny", "default", 3, 4_567_890, 4.56789, 4096, 16, *(INTERVAL,) * 6,
    kl_by_text={"code": INTERVAL, "chat": Interval(1e-5, None, None)}, quantiles=(0.0, 0.5),
)  # fmt: skip
SPEED = Speed(
    "A Mac", {"mlx": "0.32.4"}, (Run(1024, 128, 812.345, 71.234, 12_345_678_901, 12_000_000_000),)
)


def measured(report):
    return replace(
        report,
        base_model="openai/gpt-oss-20b",
        repo="user/gpt-oss-20b-16GB",
        command="quantkit quantize openai/gpt-oss-20b --budget mac:16GB -o OUT",
        fidelity=FIDELITY,
        speed=SPEED,
    )


def test_every_number_of_the_card_is_in_the_report(written):
    report = measured(written[1])
    texts = documents(report)
    known = numbers(json.loads(texts["quantkit.json"]))
    snippets = re.sub(r"```python.*?```", "", texts["README.md"], flags=re.DOTALL)
    words = re.sub(r"95% interval|9[59](\.9)?th percentile|top-1|\[.*?\]\(.*?\)", "", snippets)
    words = re.sub(r"(?<=\d)[kMB]\b", "", words)
    shown = re.findall(r"(?<![\w.-])\d+(?:\.\d+)*(?:e-?\d+)?(?![\w-])", words)
    assert len(shown) > 40
    assert [n for n in shown if n.count(".") < 2 and not found(n, known)] == []
    assert "1234.5" not in shown
    assert not found("1234.5", known)


def test_what_was_measured_is_in_the_card(written):
    text = card(measured(written[1]))
    for part in (
        "0.01235 | 0.0112 to 0.01399", "71.2", "12.35 GB", "--budget mac:16GB", "seed 3",
        "mlx_lm.server --model user/gpt-oss-20b-16GB", "Macs with 8 GB",
    ):  # fmt: skip
        assert part in text, part
    for part in ("native model", "tokens/s", "mlx_lm.server --model user"):
        assert part not in card(written[1])


def test_measured_reports_read_back(written):
    report = measured(written[1])
    value = json.loads(documents(report)["quantkit.json"])
    assert replace(Report.from_json(value, "quantkit.json"), cards=report.cards) == report


def test_recording_renews_report_and_card(tmp_path, written):
    out = shutil.copytree(written[0], tmp_path / "out")
    assert record(out, speed=SPEED)
    assert record(out, fidelity=FIDELITY)
    assert (read_report(out).speed, read_report(out).fidelity) == (SPEED, FIDELITY)
    assert "12.35 GB" in (out / "README.md").read_text()
    assert record(out, speed=None)
    assert "12.35 GB" not in (out / "README.md").read_text()


def test_a_card_of_another_version_is_still_known(tmp_path, written):
    """By its hash, not by what this version would draw."""
    out = shutil.copytree(written[0], tmp_path / "out")
    (out / "README.md").write_text("Drawn by an older one.")
    digest = hashlib.sha256(b"Drawn by an older one.").hexdigest()
    edited(lambda v: v.update(cards=[digest]))(out)
    assert record(out, speed=SPEED)
    assert "12.35 GB" in (out / "README.md").read_text()


def test_killed_between_report_and_card(tmp_path, written):
    out = shutil.copytree(written[0], tmp_path / "out")
    before = (out / "README.md").read_text()
    assert record(out, speed=SPEED)
    (out / "README.md").write_text(before)
    assert record(out, fidelity=FIDELITY)
    assert "12.35 GB" in (out / "README.md").read_text()


@pytest.mark.parametrize("content", [b"Mine.", b"\xe9"])
def test_an_edited_card_is_left_alone(tmp_path, written, content):
    out = shutil.copytree(written[0], tmp_path / "out")
    (out / "README.md").write_bytes(content)
    assert not record(out, speed=SPEED)
    assert (out / "README.md").read_bytes() == content
    assert read_report(out).speed == SPEED


def test_foreign_names_do_no_harm(written):
    name = "we:ird *big* |model| [x](http:q)\n# $(id)"
    plan = replace(written[1].plan, source=replace(written[1].plan.source, name=name))
    text = card(replace(written[1], plan=plan))
    title = next(line for line in text.splitlines() if line.startswith("# "))
    assert title.startswith(r"# we:ird \*big\* \|model\| \[x\](http:q) \# $(id), ")
    assert "$(id)" not in text.partition("## Use")[2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense: no\n---\n", None),
        ('---\nlicense: "no"\n---\n', "no"),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\nlicense: {\n---\n", None),
        ("---\ntags:\n- x\nlicense: mit\npipeline_tag: y\n---\n# Hello\n", "mit"),
        ("# No front matter\nlicense: gpl\n", None),
        ("---\nlicense: 'mit'\n---\n", "mit"),
        ("---\ntags: x\n---\ntext\nlicense: proprietary\n---\n", None),
        ("", None),
    ],
)
def test_license_of_the_source(tmp_path, text, expected):
    (tmp_path / "README.md").write_text(text)
    found = license_of(tmp_path)
    assert (found and found.id) == expected


def test_a_licence_of_its_own_keeps_name_and_link(tmp_path, written):
    text = "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n"
    (tmp_path / "README.md").write_text(text)
    front = card(replace(written[1], license=license_of(tmp_path))).split("---\n")[1]
    assert "license: other\nlicense_name: mine\nlicense_link: LICENSE\n" in front
