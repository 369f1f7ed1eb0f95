"""Plans that remove experts, from profiles made up for the purpose."""

import json
import re
from dataclasses import replace

import pytest

from quantkit.artifacts.experts import expert_blocks, expert_counts, pruned_inventory
from quantkit.artifacts.plan import Plan
from quantkit.checkpoint.source import open_source
from quantkit.errors import InputError, PlanError
from quantkit.formats.tiers import parse_tier
from quantkit.planning.allocator import plan_by_budget
from quantkit.planning.budget import Budget
from quantkit.planning.constraints import Constraints
from quantkit.planning.explain import diff
from quantkit.planning.frontier import frontier, recipe_baselines
from quantkit.planning.plan import with_predictions
from quantkit.planning.recipe import load_recipe, plan_by_recipe
from tests.support import standin, tiny
from tests.support.families import LLAMA, MOE, write
from tests.support.profiles import made_up

KEPT = Constraints(expert_counts=(8, 7, 6, 5, 4))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """8 experts, of which a token uses 4."""
    return standin.write_own(tmp_path_factory.mktemp("source") / "src")


@pytest.fixture(scope="module")
def inventory(source):
    return open_source(str(source)).inventory


def profile_of(inventory, removal):
    return made_up(inventory, counts=expert_counts(inventory), removal=removal)


@pytest.fixture(scope="module")
def saved(inventory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    data = profile_of(inventory, 1e-4).to_json()
    (folder / "profile.json").write_text(json.dumps(data))
    return folder


def test_the_tensors_of_each_expert(inventory, tmp_path):
    blocks = expert_blocks(inventory)
    assert list(blocks) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    ends = {"router.weight", "router.bias"}
    ends |= {f"experts.{p}_proj.{t}" for p in ("gate", "up", "down") for t in ("weight", "bias")}
    assert blocks["model.layers.1.mlp"] == {f"model.layers.1.mlp.{end}" for end in ends}
    moe = open_source(str(write(tmp_path / "moe", MOE))).inventory
    assert list(expert_blocks(moe)) == ["model.layers.0.mlp"]  # layer 1 is dense
    assert len(expert_blocks(moe)["model.layers.0.mlp"]) == 4
    dense = open_source(str(write(tmp_path / "dense", LLAMA))).inventory
    with pytest.raises(InputError, match="has no experts"):
        expert_blocks(dense)


def test_the_bytes_of_fewer_experts(inventory):
    kept = dict.fromkeys(expert_blocks(inventory), (0, 2, 4, 5, 6))
    pruned = pruned_inventory(inventory, kept)
    assert pruned.experts == 5
    for before, after in zip(inventory.weights, pruned.weights, strict=True):
        cut = before.role in ("router", "expert_gate", "expert_up", "expert_down")
        assert after.bytes * 8 == before.bytes * (5 if cut else 8)
        assert after.shape[1:] == before.shape[1:]
        stored = parse_tier(after.storage).stored_bytes(after.shape)
        assert stored == after.bytes


@pytest.mark.parametrize("removal", [1e-7, 1e-3, 1e-1, 10.0])
@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
def test_the_best_of_all_numbers_of_experts(inventory, removal, share):
    profile = profile_of(inventory, removal)
    experts = sum(w.bytes for w in inventory.weights if w.role.startswith("expert"))
    budget = Budget(inventory.total_bytes - int((1 - share) * experts))
    counts = (8, 7, 6, 5, 4)
    best = plan_by_budget(inventory, profile, budget, Constraints(expert_counts=counts))
    single = {}
    for count in counts:
        try:
            single[count] = plan_by_budget(
                inventory, profile, budget, Constraints(expert_counts=(count,))
            )
        except PlanError:
            continue
    assert len(single) > 1
    assert best.predicted_kl == min(plan.predicted_kl for plan in single.values())
    assert best.total_bytes <= budget.bytes
    assert best.optimality.expert_counts == counts
    assert best.optimality.bound <= best.predicted_kl
    assert best.parameters == inventory.parameters
    for count, plan in single.items():
        if count == 8:
            assert plan.pruning is None
            continue
        assert plan.pruning.count == count
        assert plan.kept_parameters < inventory.parameters
        for block, ranking in profile.expert_rankings.items():
            assert plan.pruning.kept[block] == tuple(sorted(ranking.ranking[:count]))
        bits = sum(a.kl for a in plan.assignments)
        assert plan.predicted_kl == pytest.approx(bits + removal * (8 - count) / 8 * 2)


def test_cheap_experts_go_and_dear_ones_stay(inventory):
    budget = Budget(int(inventory.total_bytes * 0.8))
    kept = [
        plan_by_budget(inventory, profile_of(inventory, kl), budget, KEPT) for kl in (1e-9, 100.0)
    ]
    assert kept[0].pruning is not None
    assert kept[1].pruning is None


def test_lossless_keeps_all(inventory):
    profile = profile_of(inventory, 1e-9)
    lossless = Budget(None, "lossless")
    plan = plan_by_budget(inventory, profile, lossless, Constraints(expert_counts=(8, 4)))
    assert plan.pruning is None
    with pytest.raises(PlanError, match="never lossless"):
        plan_by_budget(inventory, profile, lossless, Constraints(expert_counts=(4,)))


def test_both_curves(cli, source, saved, inventory):
    profile = profile_of(inventory, 1e-4)
    plans = frontier(inventory, profile, KEPT, points=6)
    alone = frontier(inventory, profile, Constraints(), points=6)
    assert plans[0].total_bytes < alone[0].total_bytes
    losses = [plan.predicted_kl for plan in plans]
    assert losses == sorted(losses, reverse=True)
    options = ("--profile", saved, "--frontier", "--prune")
    shown = json.loads(cli("plan", source, *options, "--json").stdout)
    assert {row["experts_kept"] for row in shown["frontier"]} == {None}
    assert {row["experts_kept"] for row in shown["pruned"]} > {4}
    assert "4 of 8 experts" in cli("plan", source, *options).stdout


def test_a_plan_and_its_file(cli, source, saved, tmp_path):
    file = tmp_path / "plan.json"
    options = ("--profile", saved, "-b", "3.6bpw", "--experts", "5")
    shown = cli("plan", source, *options, "-o", file).stdout
    assert "experts           5 of 8 kept in every layer" in shown
    assert "solved for 5 experts kept" in shown
    again = json.loads(cli("plan", source, "--plan", file, "--json").stdout)
    made = json.loads(file.read_text())
    assert again == made
    plan = Plan.from_json(made, "plan.json")
    assert plan.bits_per_weight == plan.total_bytes * 8 / plan.parameters
    assert plan.kept_parameters < plan.parameters


def edited(kept, change):
    block = "model.layers.1.mlp"
    return {**kept, block: change(kept[block])}


BAD = {
    "twice": (lambda k: edited(k, lambda n: [n[0], *n[:-1]]), "keeps expert \\d twice"),
    "out of range": (lambda k: edited(k, lambda n: [*n[:-1], 8]), "keeps expert 8, the last is 7"),
    "negative": (lambda k: edited(k, lambda n: [-1, *n[1:]]), "anything but numbers"),
    "not a number": (lambda k: edited(k, lambda n: ["0", *n[1:]]), "anything but numbers"),
    "no list": (lambda k: edited(k, lambda n: 3), "anything but numbers"),
    "unequal": (lambda k: edited(k, lambda n: n[:-1]), "the same number of experts"),
    "unsorted": (lambda k: edited(k, lambda n: n[::-1]), "ascending"),
    "too few": (lambda k: {b: n[:3] for b, n in k.items()}, "keeps 3 experts.*picks 4 per token"),
    "a layer too few": (lambda k: {"model.layers.0.mlp": k["model.layers.0.mlp"]}, "layers.1.mlp"),
    "an empty block": (lambda k: edited(k, lambda n: []), "anything but numbers"),
    "empty": (lambda _: {}, "malformed|no list|experts"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_plan_is_one_line(cli, source, saved, tmp_path, name):
    change, message = BAD[name]
    file = tmp_path / "plan.json"
    cli("plan", source, "--profile", saved, "-b", "3.6bpw", "--experts", "5", "-o", file)
    data = json.loads(file.read_text())
    data["pruning"]["kept"] = change(data["pruning"]["kept"])
    file.write_text(json.dumps(data))
    for command in (("plan", source, "--plan", file), ("quantize", source, "--plan", file, "-o")):
        out = (tmp_path / "out",) if command[0] == "quantize" else ()
        refused = cli(*command, *out)
        assert refused.exit_code == 2, refused.output
        assert refused.stderr.count("\n") == 1, refused.stderr
        assert re.search(message, refused.stderr), refused.stderr
    assert not (tmp_path / "out").exists()


def test_other_experts_may_be_kept(cli, source, saved, tmp_path):
    """An edited list counts as many bytes, and has no prediction."""
    file = tmp_path / "plan.json"
    cli("plan", source, "--profile", saved, "-b", "3.6bpw", "--experts", "5", "-o", file)
    data = json.loads(file.read_text())
    data["pruning"]["kept"] = {b: [0, 1, 2, 3, 4] for b in data["pruning"]["kept"]}
    file.write_text(json.dumps(data))
    again = json.loads(cli("plan", source, "--plan", file, "--json").stdout)
    assert again["origin"].startswith("edited from")
    assert again["total_bytes"] == data["total_bytes"]
    assert again["predicted_kl"] is None
    assert again["pruning"]["kl"] is None


REFUSED = {
    "no number": (("--experts", "half"), "write a number such as 96, or auto"),
    "too few": (("--experts", "3"), "Keep 4 to 8"),
    "too many": (("--experts", "9"), "Keep 4 to 8"),
    "two requests": (("--experts", "6", "--prune"), "leave out one of them"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_request_is_one_line(cli, source, saved, name):
    options, message = REFUSED[name]
    refused = cli("plan", source, "--profile", saved, "-b", "3.6bpw", *options)
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_what_the_profile_lacks(cli, source, inventory, tmp_path):
    bare = made_up(inventory)
    (tmp_path / "profile.json").write_text(json.dumps(bare.to_json()))
    options = ("--profile", tmp_path, "-b", "3.6bpw")
    for experts in ("auto", "6"):
        refused = cli("plan", source, *options, "--experts", experts)
        assert refused.exit_code == 2
        assert "lacks the cost of keeping" in refused.stderr
    assert cli("plan", source, "-r", "mxfp4-q8", "--prune").exit_code == 2


def test_predictions_are_for_the_same_experts_only(inventory):
    profile = profile_of(inventory, 1.0)
    budget = Budget(int(inventory.total_bytes * 0.6))
    plan = plan_by_budget(inventory, profile, budget, Constraints(expert_counts=(6,)))
    assert with_predictions(plan, profile).predicted_kl == plan.predicted_kl
    turned = {
        block: replace(r, ranking=r.ranking[::-1]) for block, r in profile.expert_rankings.items()
    }
    other = replace(profile, expert_rankings=turned)
    assert with_predictions(plan, other).pruning.kl is None


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The published 120b: true headers, no values."""
    data = standin.CONFIG.parent.with_name("gpt-oss-120b")
    config = json.loads((data / "config.json").read_text())
    index = json.loads((data / "model.safetensors.index.json").read_text())
    folder = tmp_path_factory.mktemp("120b") / "src"
    from quantkit.checkpoint.gpt_oss import stored_tensors

    return tiny.write_headers_only(folder, config, stored_tensors(config), index["weight_map"])


@pytest.mark.parametrize("budget", ["mac:32GB", "mac:36GB", "30GB"])
def test_the_120b_on_small_macs(cli, large, tmp_path, budget):
    """With bits alone there is no such plan on the smallest; with fewer experts there is."""
    inventory = open_source(str(large)).inventory
    assert expert_counts(inventory) == (112, 96, 80, 64)
    tiers = ("q8g64", "q6g64", "q4g64", "q3g64", "q2g64", "q1g64")
    profile = made_up(inventory, tiers, counts=expert_counts(inventory), removal=0.01)
    (tmp_path / "profile.json").write_text(json.dumps(profile.to_json()))
    options = ("--profile", tmp_path, "--budget", budget, "--prune")
    plan = cli("plan", large, *options, "--json")
    assert plan.exit_code == 0, plan.output
    made = json.loads(plan.stdout)
    assert made["pruning"]["experts_kept"] in (112, 96, 80, 64)
    assert {len(kept) for kept in made["pruning"]["kept"].values()} == {
        made["pruning"]["experts_kept"]
    }
    assert made["parameters"] == inventory.parameters == 116_829_156_672
    shown = cli("plan", large, *options).stdout
    assert f"{made['pruning']['experts_kept']} of 128 kept in every layer" in shown
    if budget == "30GB":
        assert made["total_bytes"] <= 30e9


def test_a_damaged_prediction_is_one_line(cli, source, saved, tmp_path):
    file = tmp_path / "plan.json"
    cli("plan", source, "--profile", saved, "-b", "3.6bpw", "--experts", "5", "-o", file)
    data = json.loads(file.read_text())
    for kl in ("x", 10**400):
        data["pruning"]["kl"] = kl
        file.write_text(json.dumps(data))
        refused = cli("plan", source, "--plan", file)
        assert refused.exit_code == 2, refused.output
        assert refused.stderr.count("\n") == 1


def test_numbers_in_a_list_are_all_solved(cli, source, saved):
    options = ("--profile", saved, "-b", "3.6bpw", "--json")
    listed = json.loads(cli("plan", source, *options, "--experts", "4,8").stdout)
    assert listed["optimality"]["expert_counts"] == [8, 4]
    alone = json.loads(cli("plan", source, *options).stdout)
    assert listed["predicted_kl"] <= alone["predicted_kl"]


def test_experts_that_cost_nothing(cli, source, inventory, tmp_path):
    """A frontier without a lossless end, and a repo with it in its card."""
    free = profile_of(inventory, 0.0)
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "profile.json").write_text(json.dumps(free.to_json()))
    options = ("--profile", tmp_path / "profile", "--experts", "7")
    assert cli("plan", source, *options, "--frontier").exit_code == 0
    out = tmp_path / "out"
    done = cli("quantize", source, *options, "-b", "3.6bpw", "--quantizer", "rtn", "-o", out)
    assert done.exit_code == 0, done.output


def test_recipes_keep_all_experts_and_do_not_stand_for_fewer(inventory):
    profile = profile_of(inventory, 1e-3)
    theirs = plan_by_recipe(inventory, load_recipe("mxfp4-q8"))
    budget = Budget(theirs.total_bytes)
    assert recipe_baselines(inventory, profile, budget, Constraints(routers=True))
    fewer = Constraints(routers=True, expert_counts=(6,))
    assert not recipe_baselines(inventory, profile, budget, fewer)


def test_plans_that_keep_other_experts_differ(inventory):
    profile = profile_of(inventory, 1e-2)
    budget = Budget(int(inventory.total_bytes * 0.6))
    plans = [
        plan_by_budget(inventory, profile, budget, Constraints(expert_counts=(count,)))
        for count in (8, 5)
    ]
    differences = diff(*plans)
    more = sum(one.bytes for one in differences)
    assert more == plans[1].total_bytes - plans[0].total_bytes
    assert differences[-1].weight == "experts kept"
    assert (differences[-1].before, differences[-1].after) == ("all", "5 of 8")
    kls = sum(one.kl for one in differences)
    assert kls == pytest.approx(plans[1].predicted_kl - plans[0].predicted_kl)


def test_a_value_per_expert_outside_the_router_is_refused(inventory):
    """Some architectures choose experts by a bias of their own, beside the router."""
    router = next(t for t in inventory.unquantized if t.name.endswith("router.bias"))
    beside = replace(router, name=router.name.replace("router.bias", "expert_bias"))
    with pytest.raises(InputError, match="expert_bias"):
        expert_blocks(replace(inventory, unquantized=(*inventory.unquantized, beside)))


def test_tiers_that_the_installed_mlx_lacks_are_not_chosen(monkeypatch, inventory):
    from quantkit.formats import tiers

    profile = made_up(inventory, ("q4g64", "q2g64", "q1g64"))
    least = frontier(inventory, profile, Constraints(), points=3)[0]
    assert "q1g64" in {a.tier for a in least.assignments}
    monkeypatch.setattr(tiers, "version", lambda _: "0.31.2")
    with pytest.raises(PlanError, match="not possible"):
        plan_by_budget(inventory, profile, Budget(least.total_bytes), Constraints())
    plans = frontier(inventory, profile, Constraints(), points=6)
    assert "q1g64" not in {a.tier for plan in plans for a in plan.assignments}
