import json

import pytest

from quantkit.checkpoint.source import open_source
from quantkit.errors import RecipeError, TierError
from quantkit.planning.recipe import (
    load_recipe,
    parse_recipe,
    plan_by_recipe,
    recipe_names,
)
from quantkit.storage.json_files import tomllib

SHIPPED = ["moringlabs-3.6bit", "mxfp4-q4", "mxfp4-q8", "optiq-style-4-8", "uniform-3", "uniform-4"]


@pytest.fixture(scope="module")
def inventory(checkpoint):
    return open_source(str(checkpoint)).inventory


def recipe(text):
    return parse_recipe("mine", tomllib.loads(text))


@pytest.mark.parametrize(
    ("size", "name", "stored", "bits"),
    [
        ("20b", "mxfp4-q8", 12_076_119_168, 4.619),
        ("20b", "mxfp4-q4", 11_178_480_768, 4.276),
        ("120b", "mxfp4-q8", 63_254_703_744, 4.331),
        ("120b", "moringlabs-3.6bit", 51_949_344_384, 3.557),
    ],
)
def test_sizes_of_published_repos_to_the_byte(cli, published, size, name, stored, bits):
    plan = json.loads(cli("plan", published[size], "--recipe", name, "--json").stdout)
    assert plan["total_bytes"] == stored
    assert round(plan["bits_per_weight"], 3) == bits
    shown = cli("plan", published[size], "--recipe", name).stdout
    assert f"{stored:,} bytes" in shown
    assert f"{bits:.3f} over" in shown


def test_moringlabs_gives_the_published_tiers(published):
    inventory = open_source(str(published["120b"])).inventory
    plan = plan_by_recipe(inventory, load_recipe("moringlabs-3.6bit"))
    tiers = {assignment.name: assignment.tier for assignment in plan.assignments}
    assert tiers["model.embed_tokens"] == tiers["lm_head"] == "q6g64"
    assert tiers["model.layers.5.self_attn.q_proj"] == "q6g64"
    assert tiers["model.layers.6.self_attn.q_proj"] == "q4g64"  # sliding, in the middle
    assert tiers["model.layers.7.self_attn.q_proj"] == "q6g64"  # full attention
    assert tiers["model.layers.30.self_attn.k_proj"] == "q6g64"
    assert tiers["model.layers.6.self_attn.v_proj"] == "q6g64"
    assert tiers["model.layers.6.mlp.router"] == "bf16"
    assert {tiers[f"model.layers.9.mlp.experts.{p}_proj"] for p in ("gate", "up", "down")} == {
        "q3g64"
    }


def test_bytes_read_per_token(published):
    """4 of 128 experts, one row of the embedding, all of the rest."""
    inventory = open_source(str(published["120b"])).inventory
    plan = plan_by_recipe(inventory, load_recipe("mxfp4-q8"))
    expected = 0
    for assignment in plan.assignments:
        if assignment.role.startswith("expert"):
            expected += assignment.bytes * 4 // 128
        elif assignment.role == "embedding":
            expected += assignment.bytes // 201_088
        else:
            expected += assignment.bytes
    for tensor in inventory.unquantized:
        expected += tensor.bytes * 4 // 128 if tensor.role.startswith("expert") else tensor.bytes
    assert plan.active_bytes == expected


def test_what_ships():
    assert recipe_names() == SHIPPED
    assert all(load_recipe(name).description for name in SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_cover_a_checkpoint(inventory, name):
    plan = plan_by_recipe(inventory, load_recipe(name))
    assert [c.name for c in plan.assignments] == [w.name for w in inventory.weights]
    assert plan.parameters == inventory.parameters
    assert sum(row.bytes for row in plan.tiers()) == plan.total_bytes
    assert sum(row.parameters_percent for row in plan.tiers()) == pytest.approx(100)


def test_first_matching_rule_decides(inventory):
    plan = plan_by_recipe(
        inventory,
        recipe("""
            [[rules]]
            roles = ["expert"]
            layers = [1]
            tier = "q2g32"
            [[rules]]
            roles = ["expert"]
            layers = { first = 2, last = 1 }
            tier = "q3g32"
            [[rules]]
            layer_kinds = ["full_attention"]
            tier = "q4g32"
            [[rules]]
            names = ["*_proj"]
            tier = "q5g64"
            [[rules]]
            tier = "native"
        """),
    )
    tiers = {assignment.name: assignment.tier for assignment in plan.assignments}
    assert tiers["model.layers.1.mlp.experts.up_proj"] == "q2g32"
    assert tiers["model.layers.0.mlp.experts.up_proj"] == "q3g32"
    assert tiers["model.layers.3.mlp.experts.up_proj"] == "q3g32"
    assert tiers["model.layers.2.mlp.experts.up_proj"] == "q5g64"
    assert tiers["model.layers.3.self_attn.q_proj"] == "q4g32"
    assert tiers["model.layers.2.self_attn.q_proj"] == "q5g64"
    assert tiers["lm_head"] == "bf16"


def test_keeping_the_experts_is_called_native(inventory):
    for tier in ("native", "mxfp4"):
        plan = plan_by_recipe(inventory, recipe(f'rules = [{{tier = "{tier}"}}]'))
        expert = next(c for c in plan.assignments if c.role == "expert_up")
        assert (expert.tier, expert.storage) == ("native", "mxfp4")


BAD = {
    "no rules": ("description = 'x'", r"recipe mine: \[\[rules\]\] is missing"),
    "no tier": ("[[rules]]\nroles = ['q']", "rule 1: tier is missing"),
    "unknown tier": ("[[rules]]\ntier = 'q7g64'", "rule 1: unknown tier 'q7g64'"),
    "unknown key": ("[[rules]]\ntier = 'q4g64'\nrole = 'q'", "unknown key 'role'"),
    "unknown role": ("[[rules]]\ntier = 'q4g64'\nroles = ['quary']", "unknown role 'quary'"),
    "roles as text": ("[[rules]]\ntier = 'q4g64'\nroles = 'q'", "roles takes a list of strings"),
    "layers as text": ("[[rules]]\ntier = 'q4g64'\nlayers = '0-5'", "layers takes"),
    "layer below zero": ("[[rules]]\ntier = 'q4g64'\nlayers = [-1]", "layers takes"),
    "unknown end": ("[[rules]]\ntier = 'q4g64'\nlayers = { middle = 2 }", "layers takes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_recipe(case):
    text, message = BAD[case]
    with pytest.raises(RecipeError, match=message):
        recipe(text)


def test_recipe_that_matches_nothing(inventory):
    with pytest.raises(RecipeError, match="no rule matches any weight"):
        plan_by_recipe(inventory, recipe('rules = [{tier = "q4g64", names = ["nothing"]}]'))


def test_recipe_that_leaves_a_weight(inventory):
    with pytest.raises(
        RecipeError, match=r"no rule matches model.embed_tokens \(role embedding\), like 5 others"
    ):
        plan_by_recipe(
            inventory, recipe('rules = [{tier = "q4g64", roles = ["expert", "attention"]}]')
        )


def test_tier_that_does_not_fit(inventory):
    with pytest.raises(
        TierError, match=r"layers.0.mlp.experts.down_proj: tier q4g128 does not fit"
    ):
        plan_by_recipe(inventory, recipe('rules = [{tier = "q4g128"}]'))


def test_files(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text("[[rules]]\ntier = 'q4g64'\n")
    assert load_recipe(str(mine)).name == "mine"
    mine.write_text("[[rules")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(str(mine))
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(str(tmp_path / "none.toml"))
    with pytest.raises(RecipeError, match="unknown `recipe` 'nope'. Use moringlabs"):
        load_recipe("nope")


def test_a_fallback_where_a_width_does_not_fit(cli, tmp_path, checkpoint):
    """gpt-oss's experts here are 192 wide on one side, 128 on the other."""
    rules = '[[rules]]\ntier = "q4g128"\n'
    recipe = tmp_path / "mine.toml"
    recipe.write_text(rules)
    refused = cli("plan", checkpoint, "-r", recipe)
    assert refused.exit_code == 2
    assert "tier q4g128 does not fit" in refused.stderr
    for fallback, expected in (("native", "native"), ("q4g64", "q4g64")):
        recipe.write_text(f'fallback = "{fallback}"\n{rules}')
        planned = cli("plan", checkpoint, "-r", recipe, "--json")
        tiers = {w["name"]: w["tier"] for w in json.loads(planned.stdout)["weights"]}
        assert {tier for name, tier in tiers.items() if "down_proj" in name} == {expected}
        assert {tier for name, tier in tiers.items() if "up_proj" in name} == {"q4g128"}
        assert (
            f"recipe mine: {fallback} for 4 weights whose width does not fit their tier "
            "(model.layers.0.mlp.experts.down_proj)" in planned.stderr
        )


@pytest.mark.parametrize("fallback", ["q7g64", "3"])
def test_a_fallback_that_is_no_tier(cli, tmp_path, checkpoint, fallback):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f'fallback = "{fallback}"\n[[rules]]\ntier = "q4g64"\n')
    refused = cli("plan", checkpoint, "-r", recipe)
    assert refused.exit_code == 2
    assert f"recipe mine, fallback: unknown tier '{fallback}'" in refused.stderr
