import json
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest

from quantkit.cli.main import app
from tests.support import tiny

COMMANDS = sorted(command.callback.__name__ for command in app.registered_commands)


def test_every_command_teaches(cli):
    help_text = cli("--help").output
    for command in COMMANDS:
        assert command in help_text
        result = cli(command, "--help")
        assert result.exit_code == 0
        assert len(result.output.splitlines()) > 8


def test_readme_knows_every_command():
    readme = (tiny.Path(__file__).parents[2] / "README.md").read_text()
    assert all(f"quantkit {command}" in readme for command in COMMANDS)


def test_inspect(cli, checkpoint):
    shown = cli("inspect", checkpoint)
    assert shown.exit_code == 0
    assert "gpt_oss, 4 layers, 4 experts, 2 per token" in shown.stdout
    value = json.loads(cli("inspect", checkpoint, "--json").stdout)
    assert value["total_bytes"] == sum(
        item["bytes"] for item in (*value["weights"], *value["unquantized"])
    )
    assert {"name", "role", "layer", "tier", "parameters", "bytes"} <= value["weights"][0].keys()


def test_plan(cli, checkpoint, tmp_path):
    shown = cli("plan", checkpoint, "--recipe", "mxfp4-q8")
    assert shown.exit_code == 0
    assert "native (mxfp4)" in shown.stdout
    value = json.loads(cli("plan", checkpoint, "-r", "mxfp4-q8", "--json").stdout)
    assert value["total_bytes"] > sum(weight["bytes"] for weight in value["weights"])
    assert value["bits_per_weight"] == 8 * value["total_bytes"] / value["parameters"]
    assert {"name", "role", "layer", "tier", "parameters", "bytes"} <= value["weights"][0].keys()


def test_plan_edited_by_hand_then_quantized(cli, checkpoint, tmp_path):
    plan = tmp_path / "plan.json"
    assert cli("plan", checkpoint, "-r", "uniform-4", "-o", plan).exit_code == 0
    value = json.loads(plan.read_text())
    value["weights"][-1]["tier"] = "q6g32"
    plan.write_text(json.dumps(value))
    done = cli("quantize", checkpoint, "--plan", plan, "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    counted = json.loads(cli("plan", checkpoint, "--plan", plan, "--json").stdout)
    assert counted["total_bytes"] == report["total_bytes"]
    assert counted["origin"] == report["plan"]["origin"] == "edited from recipe uniform-4"
    assert report["weights"][-1]["tier"] == "q6g32"
    assert report["total_bytes"] > value["total_bytes"]


def test_quantize_report_verify(cli, checkpoint, tmp_path):
    out = tmp_path / "out"
    done = cli("quantize", checkpoint, "-r", "mxfp4-q8", "-o", out, "--shard-size", "100kB")
    assert done.exit_code == 0, done.output
    assert "bits per weight" in done.stdout
    value = json.loads(cli("report", out, "--json").stdout)
    assert value == json.loads((out / "quantkit.json").read_text())
    assert len(value["shards"]) > 1
    assert done.stdout.startswith(cli("report", out).stdout)
    assert f"Written. Check it with: quantkit verify {out}" in done.stdout
    again = cli("quantize", checkpoint, "-r", "mxfp4-q8", "-o", out, "--shard-size", "100kB")
    assert "It was complete already" in again.stdout
    checked = cli("verify", out)
    assert checked.exit_code == 0, checked.output
    assert checked.stdout.count("ok  ") == 8
    assert checked.stdout.endswith("8 of 8 checks passed\n")
    (out / "config.json").write_text("{}")
    broken = cli("verify", out, "--no-load", "--json")
    assert broken.exit_code == 1
    value = json.loads(broken.stdout)
    assert value["ok"] is False
    assert next(c for c in value["checks"] if c["name"] == "config")["ok"] is False


def test_version(cli):
    assert cli("--version").stdout == "quantkit 0.1.0\n"


def test_a_rule_that_decides_nothing_is_named(cli, checkpoint, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[[rules]]\nnames = ['lm_hea']\ntier = 'q8g64'\n[[rules]]\ntier = 'q4g64'\n")
    planned = cli("plan", checkpoint, "-r", recipe)
    assert planned.exit_code == 0
    assert planned.stderr == "note: recipe mine: rule 1 decides no weight\n"
    assert cli("plan", checkpoint, "-r", "moringlabs-3.6bit").stderr == ""


def test_a_plan_is_not_overwritten(cli, checkpoint, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text("edited for hours")
    refused = cli("plan", checkpoint, "-r", "uniform-4", "-o", plan)
    assert refused.exit_code == 2
    assert f"{plan}: exists" in refused.stderr
    assert plan.read_text() == "edited for hours"
    assert cli("plan", checkpoint, "-r", "uniform-4", "-o", plan, "--force").exit_code == 0
    assert json.loads(plan.read_text())["kind"] == "plan"


BAD = {
    "no way to choose": (["quantize", "SRC", "-o", "OUT"], "choose tiers by exactly one of"),
    "two ways": (
        ["quantize", "SRC", "-o", "OUT", "-r", "uniform-4", "-p", "x"],
        "choose tiers by exactly one of",
    ),
    "no such recipe": (["quantize", "SRC", "-o", "OUT", "-r", "best"], "unknown --recipe 'best'"),
    "no such plan": (
        ["quantize", "SRC", "-o", "OUT", "-p", "nope.json"],
        "nope.json: no such file",
    ),
    "no such source": (["inspect", "nowhere/at/all"], "no such folder"),
    "bad size": (
        ["quantize", "SRC", "-o", "OUT", "-r", "uniform-4", "--shard-size", "5 potatoes"],
        "unknown unit 'potatoes'",
    ),
    "negative size": (
        ["quantize", "SRC", "-o", "OUT", "-r", "uniform-4", "--shard-size", "-5GB"],
        "size '-5GB' is not a number and a unit",
    ),
    "size without a unit": (
        ["quantize", "SRC", "-o", "OUT", "-r", "uniform-4", "--shard-size", "5"],
        "size '5' has no unit. Write it like 5GB",
    ),
    "budget without a unit": (
        ["quantize", "SRC", "-o", "OUT", "--budget", "4.5"],
        "budget '4.5' has no unit. Write 4.5bpw for bits per weight, or 4.5GB",
    ),
    "reserve without a unit": (
        ["quantize", "SRC", "-o", "OUT", "--budget", "mac:64GB", "--reserve", "2"],
        "size '2' has no unit",
    ),
    "too small a budget, and no profile yet": (
        ["quantize", "SRC", "-o", "OUT", "--budget", "1bpw"],
        "bpw).",  # and no KL divergence that nobody measured
    ),
    "a base model that is none": (
        ["quantize", "SRC", "-o", "OUT", "-r", "uniform-4", "--base-model", "gpt"],
        "--base-model 'gpt': write a Hub id",
    ),
    "no such dtype": (
        ["quantize", "SRC", "-o", "OUT", "-r", "uniform-4", "--dtype", "int8"],
        "unknown --dtype 'int8'",
    ),
    "nothing to a shard": (
        ["quantize", "SRC", "-o", "OUT", "-r", "uniform-4", "--shard-size", "0"],
        "larger than 0",
    ),
    "no such command": (["quantise", "SRC"], "No such command 'quantise'"),
    "no such option": (["inspect", "SRC", "--jsn"], "No such option"),
    "argument missing": (["report"], "See: "),
    "newlines in a name": (["report", "no\nsuch"], "no such: not a folder"),
    "plan into a folder": (["plan", "SRC", "-r", "uniform-4", "-o", ".", "--force"], "is a folder"),
    "not ours": (["report", "SRC"], "quantkit.json is missing: quantkit did not write this repo"),
    "no repo": (["verify", "nowhere"], "nowhere: not a folder"),
    "not a model": (["inspect", "."], "not a model folder: config.json is missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_2(cli, checkpoint, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[case]
    result = cli(*[{"SRC": checkpoint, "OUT": tmp_path / "out"}.get(a, a) for a in arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


def test_a_seed_that_is_too_large(cli, checkpoint, tmp_path):
    done = cli("profile", checkpoint, "-o", tmp_path / "out", "--seed", 2**64)
    assert done.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_a_misspelt_key_of_a_recipe(refused, checkpoint, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('falback = "native"\n[[rules]]\ntier = "q4g64"\n')
    assert "recipe mine: unknown key 'falback'" in refused(checkpoint, recipe)


BAD_RECIPES = {
    "matches nothing": ("names = ['nothing']\ntier = 'q4g64'", "no rule matches any weight"),
    "leaves a weight": ("roles = ['expert']\ntier = 'q4g64'", "no rule matches model.embed_tokens"),
    "does not fit": ("tier = 'q4g128'", "down_proj: tier q4g128 does not fit shape [4, 128, 192]"),
    "no such tier": ("tier = 'q7g64'", "rule 1: unknown tier 'q7g64'"),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_a_recipe_that_will_not_do(refused_by, tmp_path, case):
    rule, message = BAD_RECIPES[case]
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f"[[rules]]\n{rule}\n")
    assert message in refused_by(recipe)


def test_damaged_values(refused, tmp_path):
    source = tiny.write_gpt_oss(
        tmp_path / "src", lambda values: values["lm_head.weight"][3].fill(0x7FC0)
    )
    assert "lm_head: 128 of 8192 values are NaN or infinite" in refused(source)


def test_a_full_disk(refused, checkpoint, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "0.00 GB free" in refused(checkpoint)


@pytest.fixture
def refused_by(refused, checkpoint):
    return lambda recipe: refused(checkpoint, recipe)


NO_MLX = """
import sys
from quantkit.cli.main import app
try:
    app(sys.argv[1:])
except SystemExit as exit:
    assert not exit.code, exit.code
heavy = {"mlx", "mlx_lm", "transformers", "datasets", "huggingface_hub", "torch"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("command", ["--help", "inspect", "plan", "report"])
def test_starts_without_mlx(cli, checkpoint, tmp_path, command):
    out = tmp_path / "out"
    cli("quantize", checkpoint, "-r", "mxfp4-q8", "-o", out)
    arguments = {
        "--help": [],
        "inspect": [checkpoint],
        "plan": [checkpoint, "-r", "uniform-3"],
        "report": [out],
    }[command]
    run = [sys.executable, "-c", NO_MLX, command, *map(str, arguments)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_recorded_command_names_no_folders(checkpoint, tmp_path):
    """What is published tells how to do it again, not where things lie."""
    source = tmp_path / "we:ird folder"
    shutil.copytree(checkpoint, source)
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[[rules]]\ntier = "q4g64"\n')
    command = [sys.executable, "-m", "quantkit", "quantize", "../we:ird folder", "-r", str(recipe)]
    (tmp_path / "here").mkdir()
    command += ["-o", str(tmp_path / "out"), "--shard-size", "300kB", "--force"]
    subprocess.run(command, cwd=tmp_path / "here", check=True, capture_output=True)
    text = (tmp_path / "out" / "quantkit.json").read_text()
    wanted = "quantkit quantize 'we:ird folder' --recipe mine.toml --output OUT --shard-size 300kB"
    assert json.loads(text)["command"] == wanted
    assert wanted in (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in text


def test_recording_wants_the_model_that_it_was_made_from(cli, checkpoint, tmp_path):
    out, other = tmp_path / "out", tiny.gpt_oss_tensors(seed=1)
    assert cli("quantize", checkpoint, "-r", "mxfp4-q8", "-o", out).exit_code == 0
    before = (out / "quantkit.json").read_bytes()
    fine_tune = tiny.write_checkpoint(tmp_path / "other", tiny.CONFIG, other)
    done = cli("compare", fine_tune, out, "--record")
    assert done.exit_code == 2
    assert "was made from tiny-gpt-oss, not from this other" in done.stderr
    assert (out / "quantkit.json").read_bytes() == before


@pytest.mark.parametrize("stacks", [("gate_proj", "up_proj", "down_proj"), ("fc1", "fc2")])
def test_starved_experts_are_told_whatever_their_stacks_are_called(stacks):
    from quantkit.cli.profile import starved_experts

    seen = {
        f"model.layers.{i}.mlp.switch_mlp.{s}": (40, 3 + i, 99) for i in (0, 20) for s in stacks
    }
    assert starved_experts(seen) == [
        "model.layers.0.mlp.switch_mlp: fewer than 16 tokens reached experts 1 (3)"
    ]
