"""What goes along with the weights, and what a text-only repo leaves out."""

import json

import mlx_lm
import pytest

from quantkit.checkpoint.source import open_source
from quantkit.evaluation.verify import verify
from quantkit.planning.recipe import load_recipe, plan_by_recipe
from quantkit.publish.record import read_report
from quantkit.publish.upload import plan_upload
from tests.support import tiny
from tests.support.families import LLAMA, write_from_model
from tests.support.repo import write_repo

TEXT = {
    **{key: value for key, value in LLAMA.items() if key != "tie_word_embeddings"},
    "model_type": "gemma3_text",
    "head_dim": 32,
    "sliding_window": 16,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 32,
}
VISION = {
    "model_type": "gemma3",
    "text_config": TEXT,
    "vocab_size": 64,
    "eos_token_id": 1,
    "vision_config": {"hidden_size": 8},
    "audio_config": {"hidden_size": 8},
    "image_token_index": 5,
    "boi_token_index": 6,
    "mm_tokens_per_image": 256,
    "torch_dtype": "bfloat16",
}
LEFT_OUT = ("vision_config", "audio_config", "image_token_index", "boi_token_index",
            "mm_tokens_per_image")  # fmt: skip
PROCESSORS = ("preprocessor_config.json", "processor_config.json",
              "video_preprocessor_config.json", "processing_gemma.py")  # fmt: skip


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A vision-language model, of which mlx-lm runs the text part."""
    folder = tmp_path_factory.mktemp("vision") / "src"
    write_from_model(folder, VISION, extra=["vision_tower.a.weight", "multi_modal_projector.b"])
    for name in PROCESSORS:
        (folder / name).write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates" / "notes.md").write_text("no template")
    return folder


@pytest.fixture(scope="module")
def out(vision):
    source = open_source(str(vision))
    out = vision.with_name("out")
    write_repo(source, plan_by_recipe(source.inventory, load_recipe("uniform-4")), out)
    return out


def test_settings_of_what_is_left_out_are_left_out(vision, out):
    config = json.loads((out / "config.json").read_text())
    assert not config.keys() & set(LEFT_OUT)
    assert config["text_config"]["hidden_size"] == 64
    mlx_lm.convert(str(vision), str(vision.with_name("theirs")), quantize=True, q_bits=4)
    theirs = json.loads((vision.with_name("theirs") / "config.json").read_text())
    assert "vision_config" not in theirs
    assert theirs.keys() - config.keys() <= set(LEFT_OUT)


def test_no_processor_goes_along(vision, out):
    there = {path.name for path in out.iterdir()}
    assert not there & set(PROCESSORS)
    assert {"tokenizer.json", "generation_config.json"} <= there


def test_it_is_right_and_speaks(out):
    checks = list(verify(out, read_report(out)))
    assert all(check.ok for check in checks), checks


def test_additional_templates_travel(out):
    name = "additional_chat_templates/rag.jinja"
    assert (out / name).read_text() == "{{ messages }}"
    assert not (out / "additional_chat_templates" / "notes.md").exists()
    report = read_report(out)
    assert report.sha256s[name]
    assert name in dict(plan_upload(out, report, "user/name").files)


def test_a_lost_additional_template_is_found(out, tmp_path):
    import shutil

    copy = shutil.copytree(out, tmp_path / "out")
    (copy / "additional_chat_templates" / "rag.jinja").write_text("{{ 1 }}")
    failed = [check.name for check in verify(copy, read_report(copy)) if check.ok is False]
    assert failed == ["hashes"]


def test_a_text_model_keeps_its_settings(tmp_path):
    """Nothing is left out of a model that has no other parts but what is another part's."""
    config = {**tiny.CONFIG, "initial_context_length": 4096, "swiglu_limit": 7.0}
    source = open_source(str(tiny.write_gpt_oss(tmp_path / "src", config=config)))
    plan = plan_by_recipe(source.inventory, load_recipe("mxfp4-q8"))
    write_repo(source, plan, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.keys() <= written.keys()


def test_the_base_model_of_a_local_folder(cli, checkpoint, tmp_path):
    options = ("-r", "mxfp4-q8", "--base-model", "openai/gpt-oss-20b")
    done = cli("quantize", checkpoint, "-o", tmp_path / "out", *options)
    assert done.exit_code == 0, done.output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: openai/gpt-oss-20b\nbase_model_relation: quantized" in card


def test_a_base_model_named_later(cli, checkpoint, tmp_path):
    command = ("quantize", checkpoint, "-r", "mxfp4-q8", "-o", tmp_path / "out")
    assert cli(*command).exit_code == 0
    assert cli(*command, "--base-model", "openai/gpt-oss-20b").exit_code == 0
    assert read_report(tmp_path / "out").base_model == "openai/gpt-oss-20b"
    assert "base_model: openai/gpt-oss-20b" in (tmp_path / "out" / "README.md").read_text()


def test_a_template_that_was_mended_is_not_missed(cli, tmp_path):
    source = tiny.write_gpt_oss(tmp_path / "src")
    command = ("quantize", source, "-r", "mxfp4-q8", "-o", tmp_path / "out")
    assert cli(*command).exit_code == 0
    (source / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    again = cli(*command)
    assert again.exit_code == 2
    assert "holds another quant" in again.stderr
    assert cli(*command, "--force").exit_code == 0
    assert "messages[-1]" in (tmp_path / "out" / "chat_template.jinja").read_text()
