import hashlib
import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import safetensors

from quantkit.backend import mx
from quantkit.checkpoint.source import open_source
from quantkit.errors import OutputError, SourceError, TierError
from quantkit.formats.tiers import MXFP4, NATIVE, TIERS, parse_tier
from quantkit.planning.plan import make_plan
from quantkit.planning.recipe import load_recipe, plan_by_recipe, recipe_names
from quantkit.storage.input_key import InputKey
from quantkit.storage.output_dir import OutputDirectory
from tests.support import tiny
from tests.support.repo import Calls, write_repo


def quantize(folder, out, recipe="mxfp4-q8", **options):
    source = open_source(str(folder))
    plan = plan_by_recipe(source.inventory, load_recipe(recipe))
    return write_repo(source, plan, out, **options)


def tensors(repo):
    loaded = {}
    for path in sorted(repo.glob("model*.safetensors")):
        loaded.update(mx.load(str(path)))
    return loaded


def hashes(repo):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(repo.iterdir())}


def disk_bytes(repo):
    """Bytes of all tensors, counted from the files: their sizes less their headers."""
    total = 0
    for path in repo.glob("model*.safetensors"):
        with open(path, "rb") as file:
            total += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    return total


@pytest.mark.parametrize("recipe", recipe_names())
@pytest.mark.parametrize("packed", [True, False])
def test_planned_bytes_are_reported_bytes_are_bytes_on_disk(tmp_path, recipe, packed):
    folder = tiny.write_gpt_oss(tmp_path / "src", packed=packed)
    source = open_source(str(folder))
    plan = plan_by_recipe(source.inventory, load_recipe(recipe))
    report = write_repo(source, plan, tmp_path / "out", shard_bytes=200_000)
    assert plan.total_bytes == report.total_bytes == disk_bytes(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert saved["total_bytes"] == plan.total_bytes
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == plan.total_bytes
    assert index["metadata"]["total_parameters"] == source.inventory.parameters


def mlx_lm_convert(folder, out, bits):
    from mlx_lm import convert

    convert(str(folder), str(out), quantize=True, q_bits=bits, q_group_size=64)
    return tensors(out)


@pytest.mark.parametrize(("recipe", "bits"), [("mxfp4-q8", 8), ("mxfp4-q4", 4)])
def test_every_tensor_is_what_mlx_lm_convert_writes(tmp_path, checkpoint, recipe, bits):
    theirs = mlx_lm_convert(checkpoint, tmp_path / "theirs", bits)
    quantize(checkpoint, tmp_path / "ours", recipe, shard_bytes=100_000)
    ours = tensors(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        assert mx.array_equal(ours[name], expected), name


EXPERT_TIERS = [t for t in TIERS.values() if t.name not in ("f16", "f32") and t.fits((4, 128, 192))]


@pytest.mark.parametrize("tier", EXPERT_TIERS, ids=str)
def test_experts_are_decoded_exactly_and_encoded_as_mlx_would(tmp_path, checkpoint, tier):
    source = open_source(str(checkpoint))
    tiers = {
        w.name: tier if w.role.startswith("expert") else NATIVE for w in source.inventory.weights
    }
    write_repo(source, make_plan(source.inventory, tiers, "test"), tmp_path / "out")
    native = {w.name: NATIVE for w in source.inventory.weights}
    write_repo(source, make_plan(source.inventory, native, "test"), tmp_path / "native")
    ours, native = tensors(tmp_path / "out"), tensors(tmp_path / "native")
    for name in (w.name for w in source.inventory.weights if w.role.startswith("expert")):
        packed = native[f"{name}.weight"], native[f"{name}.scales"]
        if tier in (NATIVE, MXFP4):
            expected = list(packed)
        else:
            values = mx.dequantize(*packed, group_size=32, bits=4, mode="mxfp4", dtype=mx.bfloat16)
            expected = [values]
            if tier.quantized:
                expected = mx.quantize(values, tier.group_size, tier.bits, tier.mode)
        found = [ours[f"{name}.{part}"] for part in ("weight", "scales", "biases")[: len(expected)]]
        assert all(mx.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_experts_kept_native_are_the_stored_bits(tmp_path, checkpoint):
    quantize(checkpoint, tmp_path / "out")
    ours = tensors(tmp_path / "out")
    stored = {spec.name: values for spec, values in tiny.gpt_oss_tensors()}
    at = "model.layers.2.mlp.experts"
    blocks = stored[f"{at}.gate_up_proj_blocks"]
    up = np.array(ours[f"{at}.up_proj.weight"]).view(np.uint8)
    assert np.array_equal(up.reshape(4, 192, 4, 16), blocks[:, 1::2])
    assert np.array_equal(
        np.array(ours[f"{at}.gate_proj.scales"]), stored[f"{at}.gate_up_proj_scales"][:, 0::2]
    )


def test_fine_tuned_experts_become_mxfp4(tmp_path):
    folder = tiny.write_gpt_oss(tmp_path / "src", packed=False)
    report = quantize(folder, tmp_path / "out")
    assert {c.tier for c in report.plan.assignments if c.role == "expert_up"} == {"mxfp4"}
    stored = {spec.name: values for spec, values in tiny.gpt_oss_tensors(packed=False)}
    at = "model.layers.0.mlp.experts"
    gate = tiny.from_bf16(stored[f"{at}.gate_up_proj"][:, :, 0::2]).swapaxes(1, 2)
    expected = mx.quantize(mx.array(gate).astype(mx.bfloat16), 32, 4, "mxfp4")
    ours = tensors(tmp_path / "out")
    assert mx.array_equal(ours[f"{at}.gate_proj.weight"], expected[0])


def test_config_is_the_source_s_but_for_quantization(tmp_path, checkpoint):
    quantize(checkpoint, tmp_path / "out", "moringlabs-3.6bit")
    before = json.loads((checkpoint / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    entries = after.pop("quantization")
    assert after.pop("quantization_config") == entries
    before.pop("quantization_config")
    assert after == before
    assert entries["bits"] == 3
    assert entries["mode"] == "affine"
    scaled = {n.removesuffix(".scales") for n in tensors(tmp_path / "out") if n.endswith(".scales")}
    assert {key for key in entries if "." in key or key == "lm_head"} == scaled
    assert all(entries[name].keys() == {"group_size", "bits", "mode"} for name in scaled)
    assert "model.layers.0.mlp.router" not in entries


def test_yarn_folded_away_by_transformers_is_restored(tmp_path):
    rope = {"rope_theta": 150000.0, "rope_type": "yarn", "factor": 32.0}
    config = {k: v for k, v in tiny.CONFIG.items() if not k.startswith("rope")}
    config["rope_scaling"] = None
    folder = tiny.write_gpt_oss(tmp_path / "src", config={**config, "rope_parameters": rope})
    quantize(folder, tmp_path / "out")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after["rope_theta"] == 150000.0
    assert after["rope_scaling"] == {"rope_type": "yarn", "factor": 32.0}


def test_files_that_go_along(tmp_path, checkpoint):
    quantize(checkpoint, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "LICENSE", "README.md", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors", "model.safetensors.index.json", "quantkit.json", "tokenizer.json",
        "tiers.png", "tokenizer_config.json",
    }  # fmt: skip
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint / name).read_bytes()
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()


def test_no_path_of_the_machine_is_published(tmp_path, checkpoint):
    quantize(checkpoint, tmp_path / "out")
    for name in ("quantkit.json", "README.md", "config.json"):
        text = (tmp_path / "out" / name).read_text()
        assert str(checkpoint.parent) not in text
        assert str(tmp_path) not in text


def test_shards_hold_at_most_what_was_asked(tmp_path, checkpoint):
    report = quantize(checkpoint, tmp_path / "out", shard_bytes=60_000)
    assert len(report.shards) > 3
    weights = {assignment.bytes for assignment in report.plan.assignments}
    assert all(s.tensor_bytes <= 60_000 or s.tensor_bytes in weights for s in report.shards)
    names = [f"model-{i:05d}-of-{len(report.shards):05d}.safetensors" for i in range(1, 99)]
    assert [s.name for s in report.shards] == names[: len(report.shards)]
    for shard in report.shards:
        with safetensors.safe_open(tmp_path / "out" / shard.name, "np") as file:
            assert file.metadata() == {"format": "mlx"}
            assert len(list(file.keys())) > 0


def test_hashes_in_the_report(tmp_path, checkpoint):
    report = quantize(checkpoint, tmp_path / "out", shard_bytes=100_000)
    on_disk = hashes(tmp_path / "out")
    assert {s.name: s.sha256 for s in report.shards}.items() <= on_disk.items()
    sources = {file.name: file.sha256 for file in report.plan.source.files}
    assert sources.items() <= hashes(checkpoint).items()


def test_the_same_again_is_the_same(tmp_path, checkpoint):
    quantize(checkpoint, tmp_path / "a", "uniform-3", shard_bytes=100_000)
    quantize(checkpoint, tmp_path / "b", "uniform-3", shard_bytes=100_000)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_a_finished_repo_is_left_alone(tmp_path, checkpoint):
    quantize(checkpoint, tmp_path / "out")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    quantize(checkpoint, tmp_path / "out")
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before


def test_a_finished_repo_of_other_values_is_not_taken_for_this_one(tmp_path):
    folder = tiny.write_gpt_oss(tmp_path / "src")
    quantize(folder, tmp_path / "out")

    def change(values):
        values["lm_head.weight"][0, 0] ^= 1

    tiny.write_gpt_oss(folder, change)
    with pytest.raises(OutputError, match=r"out: holds another quant.*`force`"):
        quantize(folder, tmp_path / "out")


def test_another_recipe_needs_force(tmp_path, checkpoint):
    quantize(checkpoint, tmp_path / "out")
    before = hashes(tmp_path / "out")
    with pytest.raises(OutputError, match="holds another quant"):
        quantize(checkpoint, tmp_path / "out", "uniform-4")
    assert hashes(tmp_path / "out") == before
    quantize(checkpoint, tmp_path / "out", "uniform-4", force=True)
    quantize(checkpoint, tmp_path / "fresh", "uniform-4")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "fresh")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "fresh"}


def test_a_folder_that_is_not_ours_is_kept(tmp_path, checkpoint):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"out: exists, but quantkit did not make it.*`force`"):
        quantize(checkpoint, out)
    assert (out / "thesis.txt").read_text() == "years of work"
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_what_appears_meanwhile_is_kept(tmp_path, checkpoint):
    """The user puts something at OUT while the rewrite runs."""
    out = tmp_path / "out"

    def meanwhile(_done, _name):
        out.mkdir(exist_ok=True)
        (out / "thesis").write_text("years of work")

    with pytest.raises(OutputError, match="exists, but quantkit did not make it"):
        quantize(checkpoint, out, progress=meanwhile)
    assert (out / "thesis").read_text() == "years of work"
    shutil.rmtree(out)
    quantize(checkpoint, out)  # goes on from what was finished
    assert (out / "quantkit.json").exists()


def harm(out, name):
    if name.endswith(".safetensors"):
        data = bytearray((out / name).read_bytes())
        data[-1] ^= 1
        (out / name).write_bytes(data)
    elif name == "config.json":
        (out / name).write_text("{}")
    else:
        (out / name).unlink()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_harmed_repo_is_not_taken_for_finished(tmp_path, checkpoint, name):
    quantize(checkpoint, tmp_path / "out")
    before = hashes(tmp_path / "out")
    harm(tmp_path / "out", name)
    with pytest.raises(OutputError, match="holds another quant"):
        quantize(checkpoint, tmp_path / "out")
    quantize(checkpoint, tmp_path / "out", force=True)
    assert hashes(tmp_path / "out") == before


def test_another_shard_size_is_another_repo(tmp_path, checkpoint):
    sizes = [230_000, 300_000]
    for size in sizes:
        quantize(checkpoint, tmp_path / str(size), shard_bytes=size)
    assert len({len(list((tmp_path / str(s)).glob("*.safetensors"))) for s in sizes}) == 1
    with pytest.raises(OutputError, match="holds another quant"):
        quantize(checkpoint, tmp_path / "230000", shard_bytes=sizes[1])


def test_a_source_without_tokenizer(tmp_path):
    folder = tiny.write_gpt_oss(tmp_path / "src")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"has no tokenizer \(tokenizer.json"):
        quantize(folder, tmp_path / "out")
    (folder / "tokenizer.json").symlink_to("/nowhere")
    with pytest.raises(SourceError, match="tokenizer.json: a broken link"):
        quantize(folder, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"src"}


def test_a_disk_that_takes_no_file(tmp_path, checkpoint, monkeypatch):
    """No shard can be opened: an error at once, no waiting for a writer that is gone."""
    from quantkit.writer import shards

    real = open

    def refuse(path, *args, **kwargs):
        if str(path).endswith(".safetensors.tmp"):
            raise OSError(28, "No space left on device")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(shards, "open", refuse, raising=False)
    for _ in range(5):
        with pytest.raises(OutputError, match="cannot be written .No space left"):
            quantize(checkpoint, tmp_path / "out")
    monkeypatch.undo()
    quantize(checkpoint, tmp_path / "out")


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has only names that are text")
def test_a_name_that_is_no_text(tmp_path):
    source = tiny.write_gpt_oss(tmp_path / "src").rename(tmp_path / "s\udcff")
    quantize(source, tmp_path / "out")
    assert (
        "s\udcff" in json.loads((tmp_path / "out" / "quantkit.json").read_text())["source"]["name"]
    )


def test_values_too_large_for_a_tier(tmp_path):
    huge = plant("lm_head.weight", 3, 0x4900)  # 524288 in BF16
    folder = tiny.write_gpt_oss(tmp_path / "src", huge)
    source = open_source(str(folder))
    plan = make_plan(
        source.inventory, {w.name: parse_tier("f16") for w in source.inventory.weights}, "test"
    )
    with pytest.raises(TierError, match=r"lm_head: 1 values are too large for tier f16"):
        write_repo(source, plan, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"src"}


def test_links_are_not_replaced(tmp_path, checkpoint):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with pytest.raises(OutputError, match="is a link or a mount point"):
        quantize(checkpoint, tmp_path / "out", force=True)
    assert (tmp_path / "out").is_symlink()


def test_a_blob_that_is_not_what_its_name_says(tmp_path, checkpoint):
    """In the Hub's cache a shard's name is its hash: a harmed one is found."""
    folder = tmp_path / "src"
    folder.mkdir()
    for path in checkpoint.iterdir():
        shutil.copy(path, folder)
    shard = folder / "model-00000-of-00001.safetensors"
    shard.rename(tmp_path / ("0" * 64))
    shard.symlink_to(tmp_path / ("0" * 64))
    with pytest.raises(
        SourceError, match=r"model-00000-of-00001.safetensors: sha256 is .*, published was 0000"
    ):
        quantize(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_will_do(tmp_path, checkpoint):
    (tmp_path / "out").mkdir()
    quantize(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "quantkit.json").exists()


def test_parents_are_made(tmp_path, checkpoint):
    quantize(checkpoint, tmp_path / "quants" / "mine" / "out")
    assert (tmp_path / "quants" / "mine" / "out" / "config.json").exists()


@pytest.mark.parametrize("where", ["src", "src/out", "."])
def test_the_source_cannot_be_overwritten(tmp_path, where):
    folder = tiny.write_gpt_oss(tmp_path / "src")
    before = hashes(folder)
    with pytest.raises(OutputError, match="must not be replaced|lies inside the source"):
        quantize(folder, tmp_path / where, force=True)
    assert hashes(folder) == before
    assert {p.name for p in tmp_path.iterdir()} == {"src"}


def test_a_file_in_the_way(tmp_path, checkpoint):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="out: is a file"):
        quantize(checkpoint, tmp_path / "out", force=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_partial_folder_of_others_survives_a_repo_that_is_done(tmp_path, checkpoint):
    quantize(checkpoint, tmp_path / "out")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes").write_text("mine")
    quantize(checkpoint, tmp_path / "out")
    assert (tmp_path / "out.partial" / "notes").read_text() == "mine"


def test_a_loop_of_links(tmp_path, checkpoint):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OutputError, match="loop"):
        quantize(checkpoint, tmp_path / "loop")


@pytest.mark.parametrize("out", [".", "..", "/", "x/../.."])
def test_the_working_folder_cannot_be_overwritten(tmp_path, checkpoint, monkeypatch, out):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(OutputError, match="must not be replaced"):
        quantize(checkpoint, Path(out), force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["work"]


def test_a_partial_folder_that_is_not_ours(tmp_path, checkpoint):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes").write_text("mine")
    with pytest.raises(OutputError, match="exists, but quantkit did not make it"):
        quantize(checkpoint, tmp_path / "out", force=True)
    assert (tmp_path / "out.partial" / "notes").read_text() == "mine"


def test_too_little_space(tmp_path, checkpoint, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"0.00 GB free, 0\.\d+ GB needed"):
        quantize(checkpoint, tmp_path / "deep" / "out")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_asks_only_for_the_space_that_it_lacks(tmp_path, monkeypatch):
    def free(count):
        usage = namedtuple("usage", "total used free")(10**9, 10**9, count)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    def begin():
        return OutputDirectory(tmp_path / "out", InputKey({"plan": "3 bits"}), force=False)

    free(100_000_000)
    with begin() as output:
        output.require_space(30_000_000)
        (output.work / "quantized-0.npz").write_bytes(bytes(20_000_000))
    free(80_000_000)  # 20 MB are scratch now, 64 MB stay free
    with begin() as output:
        output.require_space(30_000_000)
        with pytest.raises(OutputError, match="GB needed"):
            output.require_space(30_000_000, 10_000_000)
    free(1000)
    with pytest.raises(OutputError, match="GB needed"), begin() as output:
        output.require_space(30_000_000)
    assert (output.work / "quantized-0.npz").stat().st_size == 20_000_000


def plant(name, index, bits):
    def change(values):
        values[name].reshape(-1)[index] = bits

    return change


NAN, INF = 0x7FC0, 0x7F80
AT = "model.layers.1"
DAMAGED = {
    "NaN weight": (
        True, plant(f"{AT}.self_attn.k_proj.weight", [5, 900], NAN),
        rf"{AT}.self_attn.k_proj: 2 of 8192 values are NaN or infinite",
    ),
    "infinite embedding": (
        True, plant("model.embed_tokens.weight", 77, INF),
        r"model.embed_tokens: 1 of 8192 values are NaN or infinite",
    ),
    "NaN scale of a kept expert": (
        True, plant(f"{AT}.mlp.experts.down_proj_scales", [1, 2, 3], 255),
        rf"{AT}.mlp.experts.down_proj: 3 MXFP4 scales are NaN",
    ),
    "NaN in a fine-tuned expert": (
        False, plant(f"{AT}.mlp.experts.gate_up_proj", [1, 3], NAN),
        rf"{AT}.mlp.experts.up_proj: 2 of 98304 values are NaN or infinite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_values_leave_nothing_behind(tmp_path, case):
    packed, change, message = DAMAGED[case]
    folder = tiny.write_gpt_oss(tmp_path / "src", change, packed=packed)
    with pytest.raises(SourceError, match=message) as caught:
        quantize(folder, tmp_path / "quants" / "out", shard_bytes=50_000)
    assert "\n" not in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == {"src"}


def test_damaged_experts_that_are_requantized(tmp_path):
    change = plant(f"{AT}.mlp.experts.gate_up_proj_scales", 0, 255)
    folder = tiny.write_gpt_oss(tmp_path / "src", change)
    with pytest.raises(SourceError, match=r"gate_proj: 32 of 98304 values are NaN"):
        quantize(folder, tmp_path / "out", "uniform-3")
    assert {p.name for p in tmp_path.iterdir()} == {"src"}


def test_progress_counts_every_byte(tmp_path, checkpoint):
    from quantkit.writer.writer import Rewrite, rewrite

    source = open_source(str(checkpoint))
    plan = plan_by_recipe(source.inventory, load_recipe("mxfp4-q8"))
    seen = []
    progress = Calls(lambda n, name: seen.append((n, name)))
    rewrite(Rewrite(source, plan, tmp_path / "out"), lambda _: {}, progress)
    assert sum(n for n, _ in seen) == plan.total_bytes
    assert {name for _, name in seen} > {w.name for w in source.inventory.weights}


@pytest.mark.parametrize("name", ["q4g64", "q3g64", "mxfp4", "nvfp4", "q8g32"])
def test_block_boundaries_do_not_show(tmp_path, checkpoint, monkeypatch, name):
    """Weights cut into many blocks come out as from a single one."""
    source = open_source(str(checkpoint))
    plan = make_plan(
        source.inventory, {w.name: parse_tier(name) for w in source.inventory.weights}, "test"
    )
    write_repo(source, plan, tmp_path / "one")
    monkeypatch.setattr("quantkit.checkpoint.source._BLOCK_BYTES", 4000)
    write_repo(source, plan, tmp_path / "many")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "many")
