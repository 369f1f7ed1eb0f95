"""Plans under a budget, by the command, from a profile made up for the purpose."""

import json
import re
from dataclasses import replace

import pytest

from quantkit.artifacts.memory import MemoryTarget
from quantkit.artifacts.roles import EXPERT_ROLES
from quantkit.checkpoint.model_config import ModelConfig
from quantkit.checkpoint.source import open_source
from quantkit.errors import InputError, PlanError
from quantkit.planning.allocator import corrected_by, plan_by_budget
from quantkit.planning.budget import Budget, parse_budget, parse_speed
from quantkit.planning.constraints import Constraints
from quantkit.planning.explain import explain
from quantkit.planning.frontier import frontier, recipe_baselines
from quantkit.planning.plan import with_predictions
from quantkit.planning.recipe import load_recipe, plan_by_recipe
from tests.support import tiny
from tests.support.families import LLAMA, write
from tests.support.profiles import TIERS, made_up


@pytest.fixture(scope="module")
def inventory(checkpoint):
    return open_source(str(checkpoint)).inventory


@pytest.fixture(scope="module")
def profile(inventory):
    return made_up(inventory)


@pytest.fixture(scope="module")
def saved(profile, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    (folder / "profile.json").write_text(json.dumps(profile.to_json()))
    return folder


def planned(cli, checkpoint, saved, *options):
    result = cli("plan", checkpoint, "--profile", saved, *options, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def tiers(plan):
    return {weight["name"]: weight["tier"] for weight in plan["weights"]}


@pytest.mark.parametrize("bits", [3.5, 4.5, 5.5, 7])
def test_within_budget_and_proven(cli, checkpoint, saved, profile, bits):
    plan = planned(cli, checkpoint, saved, "--budget", f"{bits}bpw")
    assert plan["total_bytes"] <= bits * plan["parameters"] / 8
    assert plan["optimality"]["gap"] < 1e-9
    assert plan["optimality"]["bound"] == pytest.approx(plan["predicted_kl"])
    costs = {w.name: w.by_tier for w in profile.weights}
    expected = sum(costs[name][tier].kl for name, tier in tiers(plan).items())
    assert plan["predicted_kl"] == pytest.approx(expected)
    assert plan["calibration_texts"][0]["name"] == "default"


def test_more_bytes_never_lose_more(inventory, profile):
    plans = frontier(inventory, profile, Constraints(), points=10)
    sizes = [plan.total_bytes for plan in plans]
    costs = [plan.predicted_kl for plan in plans]
    assert sizes == sorted(sizes)
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 0


def test_lossless_is_the_smallest_that_loses_nothing(cli, checkpoint, saved, inventory):
    plan = planned(cli, checkpoint, saved, "--budget", "lossless")
    assert plan["predicted_kl"] == 0
    assert plan["total_bytes"] == inventory.total_bytes


@pytest.mark.parametrize("recipe", ["mxfp4-q8", "moringlabs-3.6bit", "uniform-3"])
def test_at_a_recipes_bytes_no_plan_is_worse(cli, checkpoint, saved, inventory, profile, recipe):
    theirs = with_predictions(plan_by_recipe(inventory, load_recipe(recipe)), profile)
    plan = planned(cli, checkpoint, saved, "--budget", f"like:{recipe}", "--routers")
    assert plan["total_bytes"] <= theirs.total_bytes
    assert plan["predicted_kl"] <= theirs.predicted_kl * (1 + 1e-9)


@pytest.mark.parametrize("model", ["20b", "120b"])
def test_experts_never_take_a_tier_that_is_larger_and_lossier(published, model):
    """For the published shapes: no affine tier of four bits or more for MXFP4 experts."""
    inventory = open_source(str(published[model])).inventory
    profile = made_up(
        inventory, ("q8g64", "mxfp8", "q6g64", "q5g64", "q4g64", "nvfp4", "q3g64", "q2g64")
    )
    plans = frontier(inventory, profile, Constraints(), points=6)
    for plan in plans:
        for assignment in plan.assignments:
            if assignment.role.startswith("expert"):
                assert assignment.tier in ("native", "q3g64", "q2g64"), assignment


def test_pins_ties_and_floors(cli, checkpoint, saved):
    plan = planned(
        cli, checkpoint, saved, "-b", "5bpw",
        "--pin", "lm_head=q8g64", "--pin", "layers.1.self_attn.*=bf16", "--pin", "expert=native",
        "--tie", "self_attn.*", "--min-tier", "q4g64",
    )  # fmt: skip
    chosen = tiers(plan)
    assert chosen["lm_head"] == "q8g64"
    assert {chosen[f"model.layers.1.self_attn.{p}_proj"] for p in "qkvo"} == {"bf16"}
    for layer in range(4):
        assert len({chosen[f"model.layers.{layer}.self_attn.{p}_proj"] for p in "qkvo"}) == 1
        assert chosen[f"model.layers.{layer}.mlp.experts.up_proj"] == "native"
        assert chosen[f"model.layers.{layer}.mlp.router"] == "bf16"
    assert not {"q3g64", "q2g64"} & set(chosen.values())


def test_only_the_tiers_that_are_named(cli, checkpoint, saved):
    plan = planned(cli, checkpoint, saved, "-b", "4.5bpw", "--tiers", "q8g64,q2g64")
    assert set(tiers(plan).values()) <= {"q8g64", "q2g64", "native", "bf16"}


def test_routers_only_when_asked(cli, checkpoint, saved):
    options = ("-b", "3.2bpw")
    chosen = tiers(planned(cli, checkpoint, saved, *options))
    free = tiers(planned(cli, checkpoint, saved, *options, "--routers"))
    pinned = tiers(planned(cli, checkpoint, saved, *options, "--pin", "router=q8g64"))
    assert chosen["model.layers.0.mlp.router"] == "bf16"
    assert free["model.layers.0.mlp.router"] != "bf16"
    assert pinned["model.layers.0.mlp.router"] == "q8g64"


def test_bytes_read_per_token_are_a_budget_too(cli, checkpoint, saved):
    free = planned(cli, checkpoint, saved, "-b", "5bpw")
    limit = int(free["active_bytes_per_token"] * 0.95)
    slim = planned(cli, checkpoint, saved, "-b", "5bpw", "--active-bytes", f"{limit}B")
    assert slim["active_bytes_per_token"] <= limit
    assert slim["predicted_kl"] >= free["predicted_kl"]
    speed = ("--speed", f"{4e11 / limit:.3f}tok/s@400GB/s")
    fast = planned(cli, checkpoint, saved, "-b", "5bpw", *speed)
    assert fast["active_bytes_per_token"] <= limit * 1.001
    shown = cli("plan", checkpoint, "--profile", saved, "-b", "5bpw", *speed)
    assert re.search(r"speed +\d+ tokens/s at most", shown.stdout)


def test_a_saved_plan_is_whole_again_and_an_edited_one_forgets_its_proof(
    cli, checkpoint, saved, tmp_path
):
    path = tmp_path / "plan.json"
    first = planned(cli, checkpoint, saved, "-b", "4.5bpw", "-o", path)
    again = cli("plan", checkpoint, "--plan", path, "--json")
    assert json.loads(again.stdout) == first == json.loads(path.read_text())
    edited = json.loads(path.read_text())
    edited["weights"][0]["tier"] = "q2g64"
    path.write_text(json.dumps(edited))
    after = json.loads(cli("plan", checkpoint, "--plan", path, "--json").stdout)
    assert after["optimality"] is None
    assert after["predicted_kl"] is None
    assert after["calibration_texts"] == first["calibration_texts"]


def test_why_a_weight_got_its_tier(cli, checkpoint, saved):
    options = ("-b", "4.5bpw", "--explain", "layers.2.*")
    reasons = planned(cli, checkpoint, saved, *options)
    assert reasons["shadow_prices"][0] > 0
    assert {w["name"].split(".")[2] for w in reasons["weights"]} == {"2"}
    ups, downs = reasons["up"], reasons["down"]
    assert [s["worth"] for s in ups] == sorted((s["worth"] for s in ups), reverse=True)
    assert [s["worth"] for s in downs] == sorted(s["worth"] for s in downs)
    assert ups[0]["worth"] < 20  # near the price on both sides: it is an optimum
    assert downs[0]["worth"] > 1 / 20
    assert not any("router" in name for s in downs for name in s["weights"])
    shown = cli("plan", checkpoint, "--profile", saved, *options).stdout
    assert "price" in shown
    assert "layers.2.self_attn.q_proj" in shown


def test_a_plan_is_explained_for_its_own_quantizer(inventory):
    """One that is saved may have tiers that the default quantizer does not write."""
    profile = made_up(inventory, ("mxfp8", "q4g64", "q3g64"))
    limit = int(4.6 * inventory.parameters / 8)
    plan = plan_by_budget(inventory, profile, Budget(limit), Constraints())
    assert "mxfp8" in {assignment.tier for assignment in plan.assignments}
    own, default = (
        explain(plan, inventory, profile, Constraints(quantizer=name)) for name in ("rtn", "gptq")
    )
    assert own.down
    assert default == own


def test_tied_weights_change_together_and_every_limit_has_its_price(cli, checkpoint, saved):
    free = planned(cli, checkpoint, saved, "-b", "5bpw")
    limit = int(free["active_bytes_per_token"] * 0.9)
    options = (
        "-b",
        "7bpw",
        "--active-bytes",
        f"{limit}B",
        "--tie",
        "self_attn.*",
        "--explain",
        "*",
    )
    reasons = planned(cli, checkpoint, saved, *options)
    assert reasons["shadow_prices"][1] > 0
    for step in [*reasons["up"], *reasons["down"]]:
        assert len(step["weights"]) in (1, 4)
        assert any("self_attn" in name for name in step["weights"]) == (len(step["weights"]) == 4)
        price = sum(
            p * step[k] for p, k in zip(reasons["shadow_prices"], ("bytes", "read"), strict=True)
        )
        assert step["price"] == pytest.approx(price)


def test_two_plans_side_by_side(cli, checkpoint, saved, tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    first = planned(cli, checkpoint, saved, "-b", "4.5bpw", "-o", a)
    second = planned(cli, checkpoint, saved, "-b", "5bpw", "-o", b)
    found = json.loads(cli("diff", a, b, "--json").stdout)
    assert {d["weight"] for d in found} == {
        n for n, t in tiers(first).items() if tiers(second)[n] != t
    }
    assert sum(d["bytes"] for d in found) == second["total_bytes"] - first["total_bytes"]
    assert "weights differ" in cli("diff", a, b).stdout
    assert "0 weights differ" in cli("diff", a, a).stdout


def test_the_frontier_with_the_recipes_on_it(cli, checkpoint, saved, tmp_path):
    picture = tmp_path / "frontier.png"
    found = planned(cli, checkpoint, saved, "--frontier", "--plot", picture)
    assert len(found["frontier"]) > 10
    assert {row["origin"] for row in found["recipes"]} >= {"recipe mxfp4-q8", "recipe uniform-3"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "recipe mxfp4-q8" in cli("plan", checkpoint, "--profile", saved, "--frontier").stdout


def test_recipes_of_the_same_bytes_stand_for_election(inventory, profile):
    theirs = plan_by_recipe(inventory, load_recipe("moringlabs-3.6bit"))
    names = [
        p.origin
        for p in recipe_baselines(inventory, profile, Budget(theirs.total_bytes), Constraints())
    ]
    assert names == ["recipe moringlabs-3.6bit"]
    assert not recipe_baselines(inventory, profile, Budget(theirs.total_bytes - 1), Constraints())


def test_recipes_stand_for_election_under_the_quantizer_of_the_others(inventory, profile):
    ratios = {"gptq": {role: {"q3g64": 0.25} for role in EXPERT_ROLES}}
    profile = replace(profile, quantizer_ratios=ratios)
    theirs = plan_by_recipe(inventory, load_recipe("moringlabs-3.6bit"))
    budget = Budget(theirs.total_bytes, memory_target=MemoryTarget(context=4096))
    plans = {
        name: recipe_baselines(inventory, profile, budget, Constraints(quantizer=name))[0]
        for name in ("rtn", "gptq")
    }
    assert plans["gptq"].quantizer == "gptq"
    assert plans["gptq"].memory_target == budget.memory_target
    assert plans["gptq"].predicted_kl < 0.5 * plans["rtn"].predicted_kl


def test_corrections_by_role(inventory, profile):
    plan = plan_by_budget(
        inventory, profile, Budget(int(4 * inventory.parameters / 8)), Constraints()
    )
    before = sum(c.kl for c in plan.assignments if c.role == "q")
    assert before > 0
    after = corrected_by(profile, plan, {"q": 3 * before})
    for old, new in zip(profile.weights, after.weights, strict=True):
        factor = 3 if old.role == "q" else 1
        assert [n.kl for n in new.costs] == pytest.approx([factor * o.kl for o in old.costs])


def test_a_correction_leaves_expert_shift_its_part(inventory, profile):
    """The corrected profile predicts what was measured, expert-shift included."""
    plan = plan_by_budget(
        inventory, profile, Budget(int(4 * inventory.parameters / 8)), Constraints()
    )
    shifting = replace(profile, expert_shift_factor=0.1)
    names = {w.name: w for w in profile.weights if w.role == "q"}
    tiers = {a.name: a.tier for a in plan.assignments}

    def predicted(by):
        costs = {w.name: w.by_tier[tiers[w.name]].kl for w in by.weights if w.name in names}
        return sum(costs.values()) + by.expert_shift(costs)

    for share in (0.5, 3):
        wanted = share * predicted(shifting)
        after = corrected_by(shifting, plan, {"q": wanted})
        assert predicted(after) == pytest.approx(wanted)


def test_predictions_are_those_of_the_plans_quantizer(inventory, profile):
    """Where calibrated rounding helps most, tiers get smaller, and others larger."""
    ratios = {"gptq": {"expert_down": dict.fromkeys(TIERS, 0.1)}}
    knowing = replace(profile, quantizer_ratios=ratios)
    budget = Budget(int(3.2 * inventory.parameters / 8))
    plans = {
        name: plan_by_budget(inventory, knowing, budget, Constraints(quantizer=name))
        for name in ("rtn", "search", "gptq")
    }
    blind = plan_by_budget(inventory, profile, budget, Constraints(quantizer="gptq"))
    costs = {w.name: w.by_tier for w in profile.weights}
    for assignment in plans["gptq"].assignments:
        factor = 0.1 if assignment.role == "expert_down" and assignment.tier in TIERS else 1
        assert assignment.kl == pytest.approx(factor * costs[assignment.name][assignment.tier].kl)
    assert plans["gptq"].kl_quantizer == "gptq"
    assert plans["gptq"].predicted_kl < with_predictions(blind, knowing).predicted_kl
    assert blind.kl_quantizer == plans["rtn"].kl_quantizer == plans["search"].kl_quantizer == "rtn"
    assert plans["rtn"].predicted_kl == plans["search"].predicted_kl == blind.predicted_kl


def test_budgets_as_people_write_them(inventory):
    config = ModelConfig.parse(tiny.CONFIG)
    bits = inventory.parameters

    def stored(text):
        return parse_budget(text, inventory, config, MemoryTarget(None, 0, 10**9)).bytes

    assert stored("4.25bpw") == int(4.25 * bits / 8)
    assert stored("12GB") == 12 * 10**9
    assert stored("48GiB") == 48 << 30
    assert stored("300 MB") == 3 * 10**8
    assert stored("mac:64GB") == (48 << 30) - 10**9
    assert stored("mac:16GB") == (16 << 30) * 2 // 3 - 10**9
    assert stored("lossless") is None
    assert parse_speed("60tok/s@400GB/s") == (4 * 10**11 // 60, 4 * 10**11)


@pytest.mark.parametrize(("model", "full"), [("20b", 12), ("120b", 18)])
def test_the_kv_cache_of_gpt_oss(published, model, full):
    """2,048 bytes a token in every full-attention layer; sliding ones stop at 128 tokens."""
    config = json.loads((published[model] / "config.json").read_text())
    assert ModelConfig.parse(config).kv_cache_bytes(32768) == 2048 * full * (32768 + 128)


def test_like_a_folder(cli, checkpoint, saved, tmp_path):
    out = tmp_path / "out"
    assert cli("quantize", checkpoint, "-r", "uniform-4", "-o", out).exit_code == 0
    plan = planned(cli, checkpoint, saved, "-b", f"like:{out}")
    theirs = json.loads((out / "quantkit.json").read_text())["total_bytes"]
    assert theirs * 0.97 < plan["total_bytes"] <= theirs


def test_quantize_by_budget(cli, checkpoint, saved, tmp_path):
    out = tmp_path / "out"
    result = cli("quantize", checkpoint, "--profile", saved, "-b", "4.5bpw", "-o", out)
    assert result.exit_code == 0, result.output
    assert "predicted" in result.stdout
    report = json.loads((out / "quantkit.json").read_text())
    assert report["total_bytes"] <= 4.5 * report["parameters"] / 8
    assert report["plan"]["predicted_kl"] > 0
    assert cli("verify", out).exit_code == 0
    assert (
        "Predicted KL divergence to the native model, nats per token, if rounded"
        in (out / "README.md").read_text()
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("-b", "5parsec"), "not understood"),
        (("--budget=-4bpw",), "not understood"),
        (("-b", "cow:4"), "use mac:64GB"),
        (("-b", "like:nope"), "neither a folder nor a recipe"),
        (("-b", "mac:lots"), "mac:64GB"),
        (("-b", "1bpw"), "at least .* at a predicted KL divergence of"),
        (("-b", "5bpw", "--active-bytes", "1kB"), "read per token are not possible"),
        (("-b", "5bpw", "--speed", "fast"), "60tok/s@400GB/s"),
        (("-b", "5bpw", "--speed", "1tok/s@1GB/s", "--active-bytes", "1GB"), "same limit"),
        (("-b", "2.5bpw", "--pin", "expert=native"), "the allowed tiers take at least"),
        (("-b", "5bpw", "--pin", "expert=q8g64"), "is not in the profile"),
        (("-b", "5bpw", "--pin", "nothing.*=q4g64"), "matches no weight"),
        (("-b", "5bpw", "--pin", "q4g64"), "write it like"),
        (("-b", "5bpw", "--pin", "q=q9"), "unknown tier"),
        (("-b", "lossless", "--pin", "q=q4g64"), "no allowed tier is lossless"),
        (("-b", "5bpw", "--tie", "self_attn.*", "--pin", "q=q4g64", "--pin", "k=q8g64"), "no allowed tier in common"),
        (("-b", "5bpw", "-r", "mxfp4-q8"), "choose tiers by exactly one of"),
        (("-r", "mxfp4-q8", "--pin", "q=q4g64"), "need a --budget"),
        (("-b", "5bpw", "--explain", "nothing"), "matches no weight"),
        (("-b", "mac:2GB", "--context", "1000k", "--reserve", "2GB"), "nothing is left"),
        (("-b", "mac:16GB", "--context", "long"), "not a number of tokens"),
        (("-b", "5bpw", "--plot", "x.png"), "add --frontier"),
        (("--frontier", "-b", "5bpw"), "leave out --budget"),
        (("-r", "mxfp4-q8", "--refine", "1"), "--refine needs a --budget"),
        (("-b", "5bpw", "--refine", "-1"), "refine"),
        (("-b", "5bpw", "--quantizer", "best"), "Use one of rtn, search, gptq"),
    ],
)  # fmt: skip
def test_bad_budgets(cli, checkpoint, saved, options, says):
    result = cli("plan", checkpoint, "--profile", saved, *options)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert re.search(says, result.stderr), result.stderr


def test_a_budget_wants_a_profile(cli, checkpoint, tmp_path, saved):
    result = cli("plan", checkpoint, "-b", "5bpw")
    assert result.exit_code == 2
    assert "quantkit profile" in result.stderr
    llama = write(tmp_path / "llama", LLAMA)
    assert "another checkpoint" in cli("plan", llama, "--profile", saved, "-b", "5bpw").stderr


def test_a_profile_that_lacks_a_weight(inventory, profile):
    short = replace(profile, weights=profile.weights[1:])
    with pytest.raises(PlanError, match="lacks model.embed_tokens"):
        plan_by_budget(inventory, short, Budget(10**6), Constraints())


def test_a_cache_of_unknown_size():
    with pytest.raises(InputError, match="the size of the KV cache"):
        ModelConfig.parse({"num_hidden_layers": 3}).kv_cache_bytes(10)


def test_a_profiles_own_sizes_are_not_believed(inventory, profile):
    """Bytes are counted from tiers and shapes; a published profile may say anything."""

    def smaller(weight):
        return replace(weight, costs=tuple(replace(x, bytes=x.bytes // 2) for x in weight.costs))

    lying = replace(profile, weights=tuple(map(smaller, profile.weights)))
    limits = Budget(inventory.parameters // 2)
    plan, honest = (plan_by_budget(inventory, p, limits, Constraints()) for p in (lying, profile))
    assert plan.assignments == honest.assignments
    assert plan.total_bytes <= limits.bytes


def test_negative_losses_are_refused(cli, checkpoint, saved, tmp_path):
    data = json.loads((saved / "profile.json").read_text())
    next(iter(data["weights"][0]["costs"].values()))["kl"] = -1.0
    (tmp_path / "profile.json").write_text(json.dumps(data))
    result = cli("plan", checkpoint, "--profile", tmp_path, "-b", "5bpw")
    assert result.exit_code == 2
    assert "not a complete profile" in result.stderr


def test_another_profile_does_not_take_over_a_plans_proof(
    cli, checkpoint, saved, inventory, tmp_path
):
    path = tmp_path / "plan.json"
    first = planned(cli, checkpoint, saved, "-b", "4.5bpw", "-o", path)
    other = made_up(inventory, seed=1)
    (tmp_path / "profile.json").write_text(json.dumps(other.to_json()))
    shown = cli("plan", checkpoint, "--plan", path, "--profile", tmp_path, "--json")
    assert json.loads(shown.stdout) == first
    by_recipe = cli("plan", checkpoint, "-r", "mxfp4-q8", "--profile", saved, "--json")
    assert json.loads(by_recipe.stdout)["calibration_texts"] == []


def test_a_frontier_under_a_speed(inventory, profile):
    free = frontier(inventory, profile, Constraints(), points=6)
    active = free[len(free) // 2].active_bytes
    plans = frontier(inventory, profile, Constraints(), active, points=6)
    assert all(plan.active_bytes <= active for plan in plans)
    assert plans[-1].predicted_kl > 0


def put(value, *path):
    """A change to a JSON object: `value` at `path`."""

    def change(data):
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        put([], "weights", 0, "name"),
        put({}, "weights", 0, "costs"),
        put(10**400, "weights", 0, "costs", "q4g64", "kl"),
        put(1e308, "weights", 0, "costs", "q4g64", "kl"),
        put(True, "weights", 0, "costs", "q4g64", "kl"),
        put(None, "weights", 0, "unseen_experts"),
        put("zz", "calibration", "sketch"),
        put(5, "calibration", "name"),
        lambda data: data["weights"].append(data["weights"][0]),
    ],
)
def test_profiles_that_lie(cli, checkpoint, saved, tmp_path, change):
    data = json.loads((saved / "profile.json").read_text())
    change(data)
    (tmp_path / "profile.json").write_text(json.dumps(data))
    result = cli("plan", checkpoint, "--profile", tmp_path, "-b", "5bpw")
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        put("x", "measured_kl"),
        put(10**400, "weights", 0, "kl"),
        put([], "optimality", "shadow_prices"),
        put([10**400], "optimality", "shadow_prices"),
        put(float("nan"), "optimality", "bound"),
        put("zz", "calibration_texts", 0, "sketch"),
        put(3, "calibration_texts"),
    ],
)
def test_plans_that_lie(cli, checkpoint, saved, tmp_path, change):
    path = tmp_path / "plan.json"
    data = planned(cli, checkpoint, saved, "-b", "5bpw")
    change(data)
    path.write_text(json.dumps(data))
    for command in (("plan", checkpoint, "--plan", path), ("diff", path, path)):
        result = cli(*command)
        assert result.exit_code == 2, result.output
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("number", ["9" * 5000, "9" * 400 + "bpw", "٣bpw", "", " "])
@pytest.mark.parametrize("option", ["--budget", "--active-bytes", "--speed", "--reserve"])
def test_numbers_that_are_none(cli, checkpoint, saved, option, number):
    extra = ("-b", "5bpw") if option != "--budget" else ()
    extra = ("-b", "mac:16GB") if option == "--reserve" else extra
    result = cli("plan", checkpoint, "--profile", saved, *extra, option, number)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1


def test_what_a_run_needs_is_not_replaced(cli, checkpoint, saved, tmp_path):
    import shutil

    precious = shutil.copytree(saved, tmp_path / "precious")
    plan = precious / "plan.json"
    planned(cli, checkpoint, precious, "-b", "5bpw", "-o", plan)
    for options in (("--profile", precious, "-b", "5bpw"), ("--plan", plan)):
        result = cli("quantize", checkpoint, *options, "-o", precious, "--force")
        assert result.exit_code == 2, result.output
        assert (precious / "profile.json").exists()
        assert plan.exists()


def test_pictures_are_refused_before_the_work(cli, checkpoint, saved, tmp_path):
    for path in (tmp_path / "x.pgf", tmp_path / "no" / "x.png", tmp_path / "x", ""):
        result = cli("plan", checkpoint, "--profile", saved, "--frontier", "--plot", path)
        assert result.exit_code == 2, result.output
        assert result.stderr.count("\n") == 1


def test_a_plan_is_not_saved_when_its_explanation_is_refused(cli, checkpoint, saved, tmp_path):
    path = tmp_path / "plan.json"
    options = ("-b", "5bpw", "--explain", "nothing", "-o", path)
    assert cli("plan", checkpoint, "--profile", saved, *options).exit_code == 2
    assert not path.exists()
