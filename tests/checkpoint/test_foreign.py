"""Layouts that stock mlx-lm loads, and folders and names of other tools that it does not."""

import json
import shutil

import mlx_lm
import pytest
from mlx_lm.utils import load_model

from quantkit.backend import mx
from quantkit.checkpoint.foreign import recognize_files, recognize_tensors
from quantkit.checkpoint.source import open_source
from quantkit.errors import SourceError
from quantkit.evaluation.verify import verify
from quantkit.planning.recipe import load_recipe, plan_by_recipe
from quantkit.publish.record import read_report
from tests.support import hub, tiny
from tests.support.families import LLAMA, tensors, write
from tests.support.repo import write_repo

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
FIRST, SECOND = (f"model-{n:05d}-of-00001.safetensors" for n in (0, 1))


def rewritten(source, out, recipe="uniform-4"):
    opened = open_source(str(source))
    write_repo(opened, plan_by_recipe(opened.inventory, load_recipe(recipe)), out)
    assert all(check.ok for check in verify(out, read_report(out)))
    return tensors(out)


def same(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not mx.array_equal(a[name], b[name]).item()]


def merged(folder):
    """All tensors in one model.safetensors."""
    mx.save_safetensors(str(folder / WHOLE), tensors(folder))
    for name in (FIRST, SECOND):
        (folder / name).unlink()


LAYOUTS = {
    "shards without an index": lambda f: (f / INDEX).unlink(),
    "a whole file": lambda f: (merged(f), (f / INDEX).unlink()),
    "a whole file beside a stale index": merged,
}


@pytest.mark.parametrize("family", ["gpt_oss", "llama"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_however_it_is_cut_into_files(tmp_path, layout, family):
    source = tmp_path / "src"
    if family == "llama":
        write(source, LLAMA)
    else:
        tiny.write_gpt_oss(source)
    expected = rewritten(source, tmp_path / "expected")
    LAYOUTS[layout](source)
    load_model(source)  # stock mlx-lm takes it, too
    assert same(rewritten(source, tmp_path / "out"), expected) == []


NAMES = {FIRST: "weights-a.safetensors", SECOND: "consolidated.b.safetensors"}


def renamed(folder):
    text = (folder / INDEX).read_text()
    for name, other in NAMES.items():
        (folder / name).rename(folder / other)
        text = text.replace(name, other)
    (folder / INDEX).write_text(text)
    return folder


def test_shards_of_any_name_that_the_index_gives(tmp_path, checkpoint):
    source = renamed(shutil.copytree(checkpoint, tmp_path / "src"))
    expected = rewritten(checkpoint, tmp_path / "expected")
    assert same(rewritten(source, tmp_path / "out"), expected) == []


@pytest.mark.parametrize("layout", ["renamed", "without an index", "whole", "stale index"])
def test_from_the_hub(online, tmp_path, checkpoint, layout):
    source = shutil.copytree(checkpoint, tmp_path / "src")
    change = {
        "renamed": renamed,
        "without an index": LAYOUTS["shards without an index"],
        "whole": LAYOUTS["a whole file"],
        "stale index": merged,
    }[layout]
    change(source)
    (source / "unrelated.bin").write_bytes(b"0" * 10_000)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    with hub.serving({"openai/tiny": source}) as (endpoint, log):
        done = online(endpoint, "quantize", "openai/tiny", "-r", "uniform-4", "-o", "out")
    assert done.returncode == 0, done.stderr
    expected = rewritten(checkpoint, tmp_path / "expected")
    assert same(tensors(tmp_path / "out"), expected) == []
    assert not [path for _, path, _ in log if "unrelated" in path]
    assert (tmp_path / "out" / "additional_chat_templates" / "rag.jinja").exists()


@pytest.fixture(scope="module")
def converted(tmp_path_factory, checkpoint):
    """What mlx-lm itself writes of a gpt-oss: packed without -q, and dequantized."""
    found = {}
    for name, options in {"packed": {}, "dequantized": {"dequantize": True}}.items():
        found[name] = tmp_path_factory.mktemp("mlx") / name
        mlx_lm.convert(str(checkpoint), str(found[name]), **options)
    return found


def test_experts_packed_by_mlx_lm_are_native(converted, checkpoint, tmp_path):
    """MXFP4 under mlx-lm's own names is what was published: the same bytes come out."""
    opened = open_source(str(converted["packed"]))
    assert {w.storage for w in opened.inventory.weights if "experts" in w.name} == {"mxfp4"}
    for recipe in ("mxfp4-q8", "uniform-3"):
        expected = rewritten(checkpoint, tmp_path / f"expected-{recipe}", recipe)
        assert same(rewritten(converted["packed"], tmp_path / recipe, recipe), expected) == []


def test_experts_dequantized_by_mlx_lm(converted, checkpoint, tmp_path):
    """`mlx_lm.fuse --dequantize` leaves the same: BF16 under mlx-lm's names."""
    opened = open_source(str(converted["dequantized"]))
    assert {w.storage for w in opened.inventory.weights} == {"bf16"}
    assert opened.inventory.parameters == open_source(str(checkpoint)).inventory.parameters
    expected = rewritten(checkpoint, tmp_path / "expected")  # q4g64: decoded exactly, rounded alike
    assert same(rewritten(converted["dequantized"], tmp_path / "out"), expected) == []


def test_a_plan_of_them_needs_no_mlx(converted):
    """They are described from headers like a published checkpoint, layer kinds included."""
    for folder in converted.values():
        weights = open_source(str(folder)).inventory.weights
        roles = {w.role for w in weights}
        assert {"expert_gate", "expert_up", "expert_down", "router", "q", "lm_head"} <= roles
        assert {w.layer_kind for w in weights if w.layer == 1} == {"full_attention"}


@pytest.mark.parametrize("options", [{"q_bits": 4}, {"q_bits": 8, "q_group_size": 32}])
def test_really_quantized_ones_are_refused(refused, tmp_path, checkpoint, options):
    mlx_lm.convert(str(checkpoint), str(tmp_path / "mlx"), quantize=True, **options)
    assert "mlx: already quantized by mlx" in refused(tmp_path / "mlx")


FOLDERS = {
    "pytorch": (["pytorch_model.bin"], "found pytorch_model.bin; this looks like PyTorch weights"),
    "gguf": (["gpt-oss-20b-Q4_K_M.gguf"], "this looks like a GGUF model"),
    "adapter": (
        ["adapter_config.json", "adapter_model.safetensors"],
        "this looks like a LoRA adapter without its base model. Merge it first",
    ),
    "mlx adapter": (["adapters.safetensors"], "this looks like a LoRA adapter"),
    "npz": (["weights.npz"], "weights in NumPy's format"),
    "other names": (["consolidated.00.safetensors"], "of other names than model*.safetensors"),
    "nothing": ([], "found no weights at all"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_of_other_tools(refused, tmp_path, case):
    names, message = FOLDERS[case]
    source = tmp_path / "src"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(tiny.CONFIG))
    for name in names:
        (source / name).write_bytes(b"{}")
    said = refused(source)
    assert message in said
    assert "Download" not in said


@pytest.mark.parametrize("name", ["adapter_config.json", "model.gguf"])
def test_folders_without_a_config(refused, tmp_path, name):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / name).write_text("{}")
    said = refused(tmp_path / "src")
    assert "config.json is missing; found" in said
    assert recognize_files([name]) in said


TENSORS = {
    "unsloth's router": ("model.layers.0.mlp.router.linear.weight", "unsloth's training layout"),
    "unsloth's experts": ("model.layers.0.mlp.experts.down_projs.3.weight", "unsloth's"),
    "an adapter": ("base_model.model.model.layers.0.q_proj.lora_A.weight", "a LoRA adapter; merge"),
    "unmerged": ("model.layers.0.self_attn.q_proj.base_layer.weight", "were not merged"),
    "OpenAI's": ("block.0.attn.qkv.weight", "OpenAI's original layout"),
    "GGUF's": ("blk.0.attn_q.weight", "a GGUF model's names"),
    "compressed-tensors": ("model.layers.0.mlp.up_proj.weight_packed", "quantized already"),
    "FP8": ("model.layers.0.mlp.up_proj.weight_scale_inv", "quantized already"),
    "GPTQ": ("model.layers.0.mlp.up_proj.qweight", "GPTQ or AWQ: quantized already"),
    "bitsandbytes": ("model.layers.0.mlp.up_proj.weight.absmax", "bitsandbytes"),
    "a wrapper": ("module.model.embed_tokens.weight", "a wrapped PyTorch model"),
    "one per expert": ("model.layers.0.mlp.experts.0.up_proj.weight", "one tensor per expert"),
    "nobody's": ("model.memory.bank", "which belongs to no layout of gpt-oss"),
}


@pytest.mark.parametrize("instead", [True, False], ids=["instead", "besides"])
@pytest.mark.parametrize("case", TENSORS)
def test_tensor_names_of_other_tools(refused, tmp_path, case, instead):
    """In place of one of gpt-oss's own, or beside all of them: never «download it again»."""
    name, message = TENSORS[case]
    values = tiny.gpt_oss_tensors()
    if instead:
        values = values[:-1]
    spec, value = values[0]
    source = tiny.write_checkpoint(
        tmp_path / "src", tiny.CONFIG, [*values, (type(spec)(name, spec.dtype, spec.shape), value)]
    )
    said = refused(source)
    assert f"found {name}" in said
    assert message in said
    assert "ownload" not in said


@pytest.mark.parametrize("case", ["an adapter", "GPTQ", "a wrapper"])
def test_tensor_names_of_other_tools_in_other_families(refused, tmp_path, case):
    name, message = TENSORS[case]
    source = write(tmp_path / "src", LLAMA)
    held = tensors(source)
    (source / INDEX).unlink()
    for shard in (FIRST, SECOND):
        (source / shard).unlink()
    held[name] = held.pop("model.layers.0.mlp.up_proj.weight")
    mx.save_safetensors(str(source / WHOLE), held)
    said = refused(source)
    assert message in said
    assert "ownload" not in said


def test_a_truly_incomplete_checkpoint_is_to_be_downloaded(refused, tmp_path):
    source = tiny.write_checkpoint(tmp_path / "src", tiny.CONFIG, tiny.gpt_oss_tensors()[:-1])
    assert "download the shards and the index again" in refused(source)


@pytest.mark.parametrize("case", TENSORS)
def test_names_are_recognized_or_not(case):
    name, message = TENSORS[case]
    known = recognize_tensors([name, "model.norm.weight"])
    assert (known is None) == (case == "nobody's")
    assert known is None or message in known


def test_known_names_are_not_taken_for_foreign(checkpoint):
    assert recognize_tensors(open_source(str(checkpoint)).checkpoint.tensors) is None
    assert recognize_files(["config.json", "tokenizer.json", "README.md"]) is None


def test_a_missing_shard_is_named(tmp_path, checkpoint):
    source = shutil.copytree(checkpoint, tmp_path / "src")
    (source / SECOND).unlink()
    with pytest.raises(SourceError, match=f"{SECOND}: missing from"):
        open_source(str(source))
