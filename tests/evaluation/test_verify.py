import hashlib
import json
import shutil

import numpy as np
import pytest

from quantkit.backend import on_cpu
from quantkit.checkpoint.headers import read_header
from quantkit.checkpoint.source import open_source
from quantkit.evaluation.verify import verify
from quantkit.formats.tiers import NATIVE
from quantkit.planning.plan import make_plan
from quantkit.planning.recipe import load_recipe, plan_by_recipe
from quantkit.publish.record import read_report
from tests.support import tiny
from tests.support.repo import write_repo

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory, checkpoint):
    out = tmp_path_factory.mktemp("repo") / "out"
    source = open_source(str(checkpoint))
    plan = plan_by_recipe(source.inventory, load_recipe("moringlabs-3.6bit"))
    write_repo(source, plan, out, shard_bytes=plan.total_bytes // 2)
    assert (out / SHARD).exists()
    return out


@pytest.fixture
def repo(tmp_path, good):
    return shutil.copytree(good, tmp_path / "out")


def failures(repo, **options):
    checks = list(verify(repo, read_report(repo), **options))
    return {check.name: check.detail for check in checks if check.ok is False}


def test_a_good_repo(good):
    checks = list(verify(good, read_report(good)))
    assert [check.name for check in checks] == [
        "index and shards", "config", "bytes as planned", "hashes", "finite values",
        "attention as the source's",
        "stock mlx-lm loads it", "generates",
    ]  # fmt: skip
    assert all(check.ok for check in checks), checks
    assert "RoPE of 4 of 4 layers compared" in checks[5].detail


def test_without_loading(good):
    checks = list(verify(good, read_report(good), load=False))
    assert [check.ok for check in checks] == [True] * 6 + [None]


def editing(name):
    """A way to change a JSON file of a repo."""

    def changing(change):
        def edit(repo):
            data = json.loads((repo / name).read_text())
            change(data)
            (repo / name).write_text(json.dumps(data))

        return edit

    return changing


config = editing("config.json")
index = editing("model.safetensors.index.json")
report = editing("quantkit.json")


def entry(name, **values):
    def change(data):
        for key in ("quantization", "quantization_config"):
            data[key][name].update(values)

    return config(change)


def poke(ending, bits, dtype):
    """Overwrite the first value of the first tensor whose name ends so."""

    def edit(repo):
        for path in sorted(repo.glob("model*.safetensors")):
            for tensor in read_header(path).values():
                if tensor.name.endswith(ending):
                    with open(path, "r+b") as file:
                        file.seek(tensor.start)
                        file.write(np.array([bits], dtype).tobytes())
                    return

    return edit


def drop_entry(data):
    for key in ("quantization", "quantization_config"):
        data[key].pop("lm_head", None)


def drop_mode(data):
    for key in ("quantization", "quantization_config"):
        del data[key]["lm_head"]["mode"]


EXPERT = "model.layers.0.mlp.experts.up_proj"
WRONG = {
    "stray shard": (
        lambda r: shutil.copy(r / SHARD, r / "model-extra.safetensors"), "index and shards",
        "model-extra.safetensors is not in the index",
    ),
    "lost shard": (lambda r: (r / SHARD).unlink(), "index and shards", f"{SHARD}: missing"),
    "wrong total": (
        index(lambda d: d["metadata"].update(total_size=7)), "index and shards", "total_size 7",
    ),
    "wrong bits": (entry(EXPERT, bits=4), "config", f"{EXPERT}.weight is U32"),
    "wrong group": (entry(EXPERT, group_size=32), "config", f"{EXPERT}.weight is U32"),
    "wrong mode": (entry(EXPERT, mode="mxfp4"), "config", "is not a tier of mlx"),
    "no mode": (config(drop_mode), "config", "lacks its mode"),
    "no entry": (config(drop_entry), "config", "lm_head has scales, but no entry"),
    "entry too many": (
        config(lambda d: [d[k].update(x={"bits": 4}) for k in ("quantization", "quantization_config")]),
        "config", "x is in config.json's quantization, but has no scales",
    ),
    "two truths": (
        config(lambda d: d["quantization_config"].update(bits=8)), "config", "differs from",
    ),
    "NaN scale": (poke("up_proj.scales", 0x7FC0, np.uint16), "finite values", "up_proj.scales: 1 of"),
    "infinite bias": (poke("up_proj.biases", 0x7F80, np.uint16), "finite values", "biases: 1 of"),
    "NaN norm": (poke("model.norm.weight", 0x7FC0, np.uint16), "finite values", "norm.weight: 1 of"),
    "quantization is null": (config(lambda d: d.update(quantization=None)), "config", "differs from quantization"),
    "shards not listed": (
        report(lambda d: d.update(shards=[])), "hashes", "but not in both",
    ),
    "unknown storage": (
        report(lambda d: d["weights"][0].update(storage="q9")), "bytes as planned", "no tier 'q9'",
    ),
    "wrong count": (
        report(lambda d: d["weights"][0].update(parameters=7)), "bytes as planned", "planned 7",
    ),
    "other tokenizer": (
        lambda r: (r / "tokenizer.json").write_text("{}"), "hashes", "tokenizer.json: sha256",
    ),
    "lost tokenizer": (
        lambda r: (r / "tokenizer.json").unlink(), "hashes", "tokenizer.json: cannot be read",
    ),
    "other config": (
        config(lambda d: d.update(num_experts_per_tok=1)), "hashes", "config.json: sha256",
    ),
    "flipped bit": (poke("up_proj.weight", 1, np.uint32), "hashes", "sha256"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_found(repo, case):
    change, check, message = WRONG[case]
    change(repo)
    found = failures(repo, load=False)
    assert message in found[check], found


def test_another_plan_is_found(repo):
    report = json.loads((repo / "quantkit.json").read_text())
    assignment = next(w for w in report["weights"] if w["name"] == EXPERT)
    assignment["bytes"] += 8
    (repo / "quantkit.json").write_text(json.dumps(report))
    assert f"{EXPERT} takes" in failures(repo, load=False)["bytes as planned"]


def test_what_mlx_lm_cannot_load_is_found(repo):
    """Every file is as the report says, but the config does not fit the tensors."""
    config(lambda d: d.update(hidden_size=64))(repo)
    digest = hashlib.sha256((repo / "config.json").read_bytes()).hexdigest()

    def believe(data):
        next(f for f in data["files"] if f["name"] == "config.json")["sha256"] = digest

    report(believe)(repo)
    found = failures(repo)
    assert found.keys() == {"stock mlx-lm loads it"}
    assert "\n" not in found["stock mlx-lm loads it"]


def test_a_repo_that_failed_is_not_loaded(repo):
    config(lambda d: d.update(num_hidden_layers=10**12))(repo)
    checks = list(verify(repo, read_report(repo)))
    assert checks[-1].ok is None
    assert "a check failed" in checks[-1].detail


@pytest.mark.parametrize("template", ["{{ messages[0]['content'", "{{ raise_exception('no') }}"])
def test_a_chat_template_that_fails(tmp_path, template):
    """mlx-lm loads such a repo, and no chat with it works."""
    source = tiny.write_gpt_oss(tmp_path / "src")
    (source / "chat_template.jinja").write_text(template)
    opened = open_source(str(source))
    plan = plan_by_recipe(opened.inventory, load_recipe("mxfp4-q8"))
    write_repo(opened, plan, tmp_path / "out")
    found = failures(tmp_path / "out")
    assert list(found) == ["generates"]
    assert "the chat template cannot render it" in found["generates"]


@pytest.mark.skipif(not on_cpu(), reason="GPUs run experts in any float type")
def test_experts_in_floats_on_a_cpu(tmp_path):
    """mlx cannot run them there, which is no fault of the repo."""
    opened = open_source(str(tiny.write_gpt_oss(tmp_path / "src", packed=False)))
    plan = make_plan(opened.inventory, {w.name: NATIVE for w in opened.inventory.weights}, "test")
    write_repo(opened, plan, tmp_path / "out")
    checks = list(verify(tmp_path / "out", read_report(tmp_path / "out")))
    assert [check.ok for check in checks] == [True] * 7 + [None]
