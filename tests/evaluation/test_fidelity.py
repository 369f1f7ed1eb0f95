"""How close a quant is: against a computation that streams nothing."""

import json
import subprocess
import sys

import numpy as np
import pytest

from quantkit.backend import mx, on_cpu
from quantkit.calibration.calibration_set import CalibrationSpec, read_calibration_set
from quantkit.calibration.fingerprint import overlaps, sketch
from quantkit.calibration.splits import EVALUATE
from quantkit.checkpoint.source import open_source
from quantkit.evaluation.fidelity import prepare
from quantkit.storage.paths import REPORT_FILE
from tests.support import tiny
from tests.support.reference import plainly_loaded
from tests.support.text import rows

LENGTH = 24


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return rows(tmp_path_factory.mktemp("text") / "judged.jsonl", seed=1, count=60, length=61)


@pytest.fixture(scope="module")
def quants(checkpoint, tmp_path_factory):
    """Two known quants of the tiny gpt-oss."""
    folder = tmp_path_factory.mktemp("quants")
    for recipe in ("mxfp4-q8", "uniform-3"):
        subprocess.run(
            [
                sys.executable,
                "-m",
                "quantkit",
                "quantize",
                checkpoint,
                "-r",
                recipe,
                "-o",
                folder / recipe,
            ],
            check=True,
            capture_output=True,
        )
    return [folder / "mxfp4-q8", folder / "uniform-3"]


def options(text):
    return ("--text", text, "--tokens", 192, "--sequence-length", LENGTH)


def compared(cli, *arguments):
    result = cli("compare", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["results"]


def stock(folder):
    """mlx-lm's own model, its kernels computing in float32."""
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return model


@pytest.mark.skipif(not on_cpu(), reason="the reference is float32")
def test_two_quants_against_a_plain_computation(cli, checkpoint, quants, text):
    found = compared(cli, checkpoint, *quants, *options(text))
    source = open_source(str(checkpoint))
    tokens = mx.array(prepare(source, [], CalibrationSpec(str(text), 192, LENGTH)).text.tokens)
    native = plainly_loaded(checkpoint)(tokens)
    p = native - mx.logsumexp(native, axis=-1, keepdims=True)
    for result, folder in zip(found, quants, strict=True):
        logits = stock(folder)(tokens)
        q = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        kl = np.array((mx.exp(p) * (p - q)).sum(axis=-1))
        assert result["tokens"] == kl.size
        assert result["kl_mean"] == pytest.approx(kl.mean(), abs=1e-4)
        assert result["kl_median"] == pytest.approx(np.median(kl), abs=1e-4)
        assert result["kl_p95"] == pytest.approx(np.quantile(kl, 0.95), abs=1e-4)
        assert result["kl_p999"] == pytest.approx(np.quantile(kl, 0.999), abs=1e-4)
        same = np.array(p.argmax(-1) == q.argmax(-1))
        assert result["top1_agreement"] == pytest.approx(same.mean(), abs=1e-4)
        index = tokens[:, 1:, None]
        worse = mx.take_along_axis(p[:, :-1], index, -1) - mx.take_along_axis(q[:, :-1], index, -1)
        assert result["perplexity_ratio"] == pytest.approx(np.exp(worse.mean().item()), abs=1e-4)
        low, high = result["kl_mean_interval"]
        assert low < result["kl_mean"] < high
        assert set(result["texts"]) == {text.name, "chat"}
    assert found[0]["kl_mean"] < found[1]["kl_mean"]


def test_the_native_model_is_itself(cli, checkpoint, text):
    (same,) = compared(cli, checkpoint, checkpoint, *options(text))
    assert same["kl_mean"] == 0
    assert same["kl_p999"] == 0
    assert same["top1_agreement"] == 1
    assert same["perplexity_ratio"] == 1


def test_the_native_models_output_is_kept(cli, checkpoint, quants, text, monkeypatch):
    first = compared(cli, checkpoint, quants[0], *options(text))
    runs = []
    run = "quantkit.evaluation.fidelity._output"
    from quantkit.evaluation import fidelity

    output = fidelity._output
    monkeypatch.setattr(run, lambda *arguments: runs.append(1) or output(*arguments))
    assert compared(cli, checkpoint, quants[0], *options(text)) == first
    assert len(runs) == 1  # the quant's alone


def test_a_table_and_a_picture(cli, checkpoint, quants, text, tmp_path):
    picture = tmp_path / "kl.png"
    result = cli("compare", checkpoint, *quants, *options(text), "--plot", picture)
    assert result.exit_code == 0, result.output
    assert "top-1 agreement" in result.stdout
    assert "mxfp4-q8" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_quants_by_mlx_lm(cli, checkpoint, tmp_path, text):
    """What stock mlx_lm.convert writes is judged like our own."""
    from mlx_lm import convert

    convert(str(checkpoint), str(tmp_path / "theirs"), quantize=True, q_bits=8, q_group_size=64)
    (found,) = compared(cli, checkpoint, tmp_path / "theirs", *options(text))
    assert 0 < found["kl_mean"] < 0.5


def refusal(cli, *arguments):
    result = cli("compare", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_another_tokenizer(cli, checkpoint, tmp_path, text):
    other = tiny.write_gpt_oss(tmp_path / "other")
    tiny.write_tokenizer(other, 63)
    assert "tokenizer differs" in refusal(cli, checkpoint, other, *options(text))


def test_text_that_the_quant_was_made_with(cli, checkpoint, quants, text, tmp_path):
    import shutil

    made = tmp_path / "made"
    shutil.copytree(quants[0], made)
    report = json.loads((made / REPORT_FILE).read_text())
    source = open_source(str(checkpoint))
    request = CalibrationSpec(str(text), 2400, LENGTH, seed=5)
    about = read_calibration_set(source.checkpoint, request, EVALUATE).text
    report["plan"]["calibration_texts"] = [about.to_json()]
    (made / REPORT_FILE).write_text(json.dumps(report))
    assert "was made with this text" in refusal(cli, checkpoint, made, *options(text))
    about = read_calibration_set(source.checkpoint, request).text
    report["plan"]["calibration_texts"] = [about.to_json()]
    (made / REPORT_FILE).write_text(json.dumps(report))
    for seed in (0, 5):  # the documents to evaluate on are the same for every seed
        assert compared(cli, checkpoint, made, *options(text), "--seed", seed)


def test_values_that_are_not_finite(cli, checkpoint, tmp_path, text):
    def spoil(values):
        values["model.layers.2.self_attn.o_proj.bias"][0] = 0x7FC0

    bad = tiny.write_gpt_oss(tmp_path / "bad", spoil)
    assert "layer 2" in refusal(cli, checkpoint, bad, *options(text))


@pytest.mark.parametrize("repo", ["nowhere", "."])
def test_no_such_repo(cli, checkpoint, text, repo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(cli, checkpoint, repo, *options(text)).startswith("error: ")


@pytest.mark.parametrize("sequences", [20, 200, 2000])
@pytest.mark.parametrize("length", [16, 256])
def test_a_sketch_knows_its_text(sequences, length):
    rng = np.random.default_rng(0)
    known, other = rng.integers(0, 50000, (2, sequences, length), np.int32)
    about = sketch(known)
    assert len(about) < 17000
    for start in range(0, sequences, max(16, sequences // 8)):
        assert overlaps(known[start : start + 16], about)
    assert not overlaps(other[:16], about)


def test_one_known_sequence_among_others_and_a_common_opening():
    rng = np.random.default_rng(0)
    known, other = rng.integers(0, 50000, (2, 50, 256), np.int32)
    about = sketch(known)
    assert overlaps(np.concatenate([other[:20], known[7:8]]), about)
    opening = np.concatenate([np.repeat(known[:1, :100], 10, axis=0), other[:10, :156]], axis=1)
    assert not overlaps(opening, about)


def test_a_vocabulary_of_another_size(cli, checkpoint, tmp_path, text):
    """Padded or cut, with the same tokenizer: refused, not read past its end."""
    other = tiny.write_gpt_oss(tmp_path / "other", config={**tiny.CONFIG, "vocab_size": 60})
    tiny.write_tokenizer(other, 64)
    assert "60 rows, the native one 64" in refusal(cli, checkpoint, other, *options(text))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda config: config.update(quantization=[1]), "quantization is not an object"),
        (lambda config: config["quantization"].update(bits=7) or config["quantization"].pop("lm_head"), "is not a tier"),
        (lambda config: config.update(num_hidden_layers=3), "not part of the model"),
    ],
    ids=["list", "bits", "layers"],
)  # fmt: skip
def test_odd_configs(cli, checkpoint, quants, tmp_path, text, change, says):
    import shutil

    odd = tmp_path / "odd"
    shutil.copytree(quants[0], odd)
    config = json.loads((odd / "config.json").read_text())
    change(config)
    (odd / "config.json").write_text(json.dumps(config))
    assert says in refusal(cli, checkpoint, odd, *options(text))


@pytest.mark.parametrize("damage", ["empty", "zip", "zeros", "rows", "nan"])
def test_a_damaged_cache_is_made_anew(cli, checkpoint, quants, text, damage, tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    expected = compared(cli, checkpoint, quants[0], *options(text))
    (path,) = (tmp_path / "native").iterdir()
    cached = np.load(path)
    if damage in ("empty", "zip"):
        path.write_bytes(b"" if damage == "empty" else b"PK\x03\x04 and more")
    else:
        spoilt = {"zeros": cached * 0, "rows": cached[:1], "nan": cached * np.nan}
        np.save(path, spoilt[damage])
    assert compared(cli, checkpoint, quants[0], *options(text)) == expected
    assert np.array_equal(np.load(path), cached)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("null.jsonl", "null\n", "does not start with a JSON object"),
        ("a*b.jsonl", '{"text": "w3"}\n', "name a plain file"),
        ("", None, "name a plain file"),
    ],
)
def test_texts_that_crash_their_reader(cli, checkpoint, quants, tmp_path, name, content, says):
    path = tmp_path / name if name else ""
    if content is not None:
        path.write_text(content)
    assert says in refusal(cli, checkpoint, quants[0], "--text", path, "--tokens", 64)


def test_a_template_that_raises(cli, tmp_path, quants, text):
    source = tiny.write_gpt_oss(tmp_path / "src")
    (source / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    assert "chat template cannot render" in refusal(cli, source, quants[0], *options(text))
