"""The profiler on tiny models: true, resumable, shareable, and clear about what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from quantkit.backend import mx
from quantkit.checkpoint.source import open_source
from quantkit.formats.codec import fake_quantize
from quantkit.formats.tiers import parse_tier
from quantkit.sensitivity.entries import candidate_entries, parse_tiers
from quantkit.sensitivity.exact import measure_entries
from quantkit.sensitivity.validation import spearman
from quantkit.storage.json_files import FORMAT_VERSION
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.layer_trace import hooked
from quantkit.streaming.lm_head import ChangedModel, divergence, label_gradients
from tests.support import hub, tiny
from tests.support.families import LLAMA, MOE, write
from tests.support.reference import plainly_loaded
from tests.support.text import rows

pytestmark = pytest.mark.skipif(
    version("mlx-lm").startswith("0.31"), reason="mlx-lm differentiates its expert indices there"
)

PROFILE = (sys.executable, "-m", "quantkit", "profile")
SMALL = ("--tokens", "96", "--sequence-length", "24", "--tiers", "q8g32,q3g64,q2g64")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return rows(tmp_path_factory.mktemp("text") / "text.jsonl", seed=0, count=40, length=60)


@pytest.fixture(scope="module")
def profiled(checkpoint, text, tmp_path_factory):
    """A profile of the tiny gpt-oss, made by the command."""
    out = tmp_path_factory.mktemp("profile") / "p"
    command = [*PROFILE, checkpoint, "-o", out]
    subprocess.run([*command, "--calibration", text, *SMALL], check=True, capture_output=True)
    return out


def factor(folder):
    found = json.loads((Path(folder) / "profile.json").read_text())["expert_shift_factor"]
    assert found > 0
    return found


def table(folder):
    made = json.loads((Path(folder) / "profile.json").read_text())
    return {(w["name"], t): loss for w in made["weights"] for t, loss in w["costs"].items()}


@pytest.mark.parametrize("model", [None, LLAMA, MOE], ids=["gpt-oss", "llama", "qwen3-moe"])
def test_measured_is_what_a_plain_model_says(checkpoint, tmp_path, model):
    """KL of a changed weight, against mlx-lm's whole model with that weight replaced."""
    folder = checkpoint if model is None else write(tmp_path / "src", model)
    source = open_source(str(folder))
    streaming = StreamingModel(source)
    tokens = mx.random.randint(0, 64, (2, 20), key=mx.random.key(0))
    entries = candidate_entries(source.inventory.weights, ["q2g32"])
    found = measure_entries(streaming, tokens, entries, lambda _: None)
    plain = plainly_loaded(folder)
    native = plain(tokens)
    modules = dict(plain.named_modules())
    for entry in entries:
        module = modules[entry.weight.name]
        before = module.weight
        module.weight = fake_quantize(streaming.values(entry.weight.name), entry.tier)
        changed = plain(tokens)
        module.weight = before
        p = native - mx.logsumexp(native, axis=-1, keepdims=True)
        q = changed - mx.logsumexp(changed, axis=-1, keepdims=True)
        expected = (mx.exp(p) * (p - q)).sum(axis=-1).mean(axis=-1)
        assert np.allclose(found[entry.key], np.array(expected), rtol=2e-3, atol=2e-6), entry.key


def test_a_replay_is_a_run_with_the_weight_changed(checkpoint):
    """What is left out of a re-run would have given the same."""
    source = open_source(str(checkpoint))
    model = StreamingModel(source)
    calls = []
    model.run(
        mx.random.randint(0, 64, (2, 40), key=mx.random.key(0)), lambda n, c, y: calls.append(c)
    )
    weights = [w for w in source.inventory.weights if w.layer == 1]
    tier = parse_tier("q3g64")
    with hooked(model.layers[1], [w.name for w in weights]) as layer:
        trace = layer.record(calls[1])
        for weight in weights:
            if not tier.fits(weight.shape):
                continue
            with layer.changed(weight.name, model.values(weight.name), tier):
                again, whole = layer.rerun(trace, weight.name, None), layer.run(calls[1])
            assert mx.allclose(again, whole, atol=1e-5), weight.name
            assert mx.abs(whole - trace.y).max().item() > 1e-4, weight.name
        assert mx.array_equal(layer.run(calls[1]), trace.y)


@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_label_gradients_have_the_scores_variance(checkpoint, scale):
    """For the head's own input, E g g^T is the covariance of the head's rows under p."""
    model = StreamingModel(open_source(str(checkpoint)))
    head = model.head
    block = model.head_block
    model.head_block = lambda x, *rows: scale * block(x, *rows)  # flat, peaked, certain
    h = mx.random.normal((1, 2, 128), key=mx.random.key(0))
    draws = 4000
    u = mx.random.uniform(shape=(draws, 1, 2), key=mx.random.key(1))
    direction = mx.random.normal(h.shape, key=mx.random.key(2))
    g = mx.stack(label_gradients(model, h, u))
    squares = np.array(mx.square((g * direction).sum(axis=-1)))[:, 0]
    step = 1e-2
    z = scale * (head(h + step * direction) - head(h - step * direction)) / (2 * step)
    p = mx.softmax(scale * head(h), axis=-1)
    variance = np.array((p * z * z).sum(-1) - mx.square((p * z).sum(-1)))[0]
    error = squares.std(axis=0) / draws**0.5
    assert np.all(np.abs(squares.mean(axis=0) - variance) < 4 * error + 1e-3 * variance + 1e-9)


def test_labels_are_drawn_where_gradients_are_large(checkpoint):
    """Squared slopes vary less than with labels drawn from the model."""
    model = StreamingModel(open_source(str(checkpoint)))
    block, head = model.head_block, model.head
    model.head_block = lambda x, *rows: 10 * block(x, *rows)  # some tokens are likely
    h = mx.random.normal((1, 2, 128), key=mx.random.key(0))
    u = mx.random.uniform(shape=(4000, 1, 2), key=mx.random.key(1))
    direction = mx.random.normal(h.shape, key=mx.random.key(2))
    slopes = [(g * direction).sum(axis=-1) for g in label_gradients(model, h, u)]
    ours = np.array(mx.square(mx.stack(slopes)))[:, 0]
    step = 1e-2
    z = 10 * (head(h + step * direction) - head(h - step * direction)) / (2 * step)
    p = mx.softmax(10 * head(h), axis=-1)
    z = z - (p * z).sum(axis=-1, keepdims=True)
    plain = np.array((p * z**4).sum(-1) - mx.square((p * z * z).sum(-1)))[0]
    assert np.all(ours.var(axis=0) < 0.5 * plain)


def test_divergence_of_nothing_and_of_little(checkpoint):
    model = StreamingModel(open_source(str(checkpoint)))
    h = mx.random.normal((1, 3, 128), key=mx.random.key(0))
    same, little = divergence(model, h, [ChangedModel(h), ChangedModel(h * (1 + 1e-4))])
    assert mx.abs(same).max().item() == 0
    assert 0 < little.mean().item() < 1e-6


def test_divergence_of_logits_that_are_shifted(checkpoint):
    """A softmax does not see it when all logits move together, however far."""
    model = StreamingModel(open_source(str(checkpoint)))
    h = mx.random.normal((1, 3, 128), key=mx.random.key(0))
    other = mx.random.normal((1, 3, 128), key=mx.random.key(1))
    block = model.head_block
    (plain,) = divergence(model, h, [ChangedModel(other)])
    for shift in (-60.0, 60.0):
        moved = SimpleNamespace(head_block=lambda h, rows, tier, s=shift: block(h, rows, tier) + s)
        (shifted,) = divergence(model, h, [ChangedModel(other, model=moved)])
        assert mx.allclose(shifted, plain, rtol=1e-3).item()


def test_predictions_rank_like_the_truth(checkpoint, profiled):
    source = open_source(str(checkpoint))
    entries = candidate_entries(source.inventory.weights, ["q3g64", "q2g64"])
    tokens = mx.random.randint(3, 64, (8, 24), key=mx.random.key(5))
    truth = measure_entries(StreamingModel(source), tokens, entries, lambda _: None)
    costs = table(profiled)
    guess = np.array([costs[e.key]["kl"] for e in entries])
    real = np.array([truth[e.key].mean() for e in entries])
    assert spearman(guess, real) > 0.9
    assert 0.5 < np.median(guess / real) < 1.5


def test_what_a_profile_says(checkpoint, profiled):
    made = json.loads((profiled / "profile.json").read_text())
    source = open_source(str(checkpoint))
    assert [w["name"] for w in made["weights"]] == [w.name for w in source.inventory.weights]
    by_name = {w["name"]: w for w in made["weights"]}
    expert = by_name["model.layers.0.mlp.experts.up_proj"]
    assert list(expert["costs"]) == ["native", "q3g64", "q2g64"]  # q8 is larger, and loses
    assert expert["costs"]["native"] == {
        "bytes": expert["costs"]["native"]["bytes"],
        "kl": 0,
        "stderr": 0,
    }
    query = by_name["model.layers.0.self_attn.q_proj"]["costs"]
    assert list(query) == ["bf16", "q8g32", "q3g64", "q2g64"]
    assert query["q8g32"]["kl"] < query["q3g64"]["kl"] < query["q2g64"]["kl"]
    assert all(loss["stderr"] > 0 for tier, loss in query.items() if tier != "bf16")
    assert all(len(file["sha256"]) == 64 for file in made["source"]["files"])
    seen = made["expert_tokens"]["model.layers.0.mlp.experts.up_proj"]
    assert sum(seen) == 96 * 2
    importance = mx.load(str(profiled / "importance.safetensors"))
    assert importance["model.layers.0.mlp.experts.down_proj"].shape == (4, 192)
    assert importance["model.layers.0.self_attn.q_proj"].shape == (1, 128)
    assert all(mx.isfinite(v).all().item() for v in importance.values())


def test_importance_is_the_mean_squared_input(checkpoint, text, profiled):
    from quantkit.calibration.calibration_set import CalibrationSpec, read_calibration_set

    source = open_source(str(checkpoint))
    tokens = read_calibration_set(source.checkpoint, CalibrationSpec(str(text), 96, 24)).tokens
    model = plainly_loaded(checkpoint)
    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(mx.array(tokens)))
    found = mx.load(str(profiled / "importance.safetensors"))["model.layers.0.self_attn.k_proj"]
    assert mx.allclose(found[0], mx.square(x).mean(axis=(0, 1)), rtol=1e-3)


def test_more_tiers_measure_only_what_is_missing(cli, checkpoint, text, profiled, tmp_path):
    out = tmp_path / "p"
    first = cli(
        "profile", checkpoint, "-o", out, "--calibration", text, *SMALL[:4], "--tiers", "q3g64"
    )
    assert first.exit_code == 0, first.output
    second = cli("profile", checkpoint, "-o", out, "--calibration", text, *SMALL)
    assert second.exit_code == 0, second.output
    assert json.loads((out / "run.json").read_text())["entries"] < len(table(profiled))
    assert table(out) == table(profiled)
    assert factor(out) == factor(profiled)
    before = (out / "profile.json").stat().st_mtime_ns
    assert cli("profile", checkpoint, "-o", out, "--calibration", text, *SMALL).exit_code == 0
    assert (out / "profile.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("method", ["fisher", "kl"])
def test_a_killed_profile_goes_on(checkpoint, text, tmp_path, method):
    """The file is that of an undisturbed run, wherever the run was killed."""
    arguments = ["--calibration", text, *SMALL, "--method", method]
    if method == "fisher":
        arguments += ["--prune"]

    def command(out):
        return [*PROFILE, checkpoint, "-o", out, *arguments]

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    out = tmp_path / "killed"
    work = tmp_path / "killed.partial" / "work"
    marks = ("x-2.npy", "stage-2.json") if method == "fisher" else ("measured-1.json",)
    for mark in marks:
        process = subprocess.Popen(
            command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not (work / mark).exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    assert (work / marks[-1]).exists()
    stamp = (work / marks[-1]).stat().st_mtime_ns
    process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (work / marks[-1]).exists():
        with suppress(FileNotFoundError):  # finished just now
            assert (work / marks[-1]).stat().st_mtime_ns == stamp  # not measured again
        time.sleep(0.002)
    assert process.wait() == 0
    for name in ("profile.json", "importance.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not work.parent.exists()


def launched(out, checkpoint, *options):
    """Two processes on the ring backend."""
    launcher = Path(sys.executable).with_name("mlx.launch")
    command = [launcher, "-n", "2", "--backend", "ring", "--", launcher.with_name("quantkit")]
    return subprocess.run(
        [*map(str, (*command, "profile", checkpoint, "-o", out, *options))],
        env=os.environ | {"PATH": f"{launcher.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_two_processes_give_the_same_table(checkpoint, text, profiled, tmp_path):
    result = launched(tmp_path / "out", checkpoint, "--calibration", text, *SMALL)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Written to") == 1
    alone, together = table(profiled), table(tmp_path / "out")
    assert alone.keys() == together.keys()
    for key, loss in alone.items():
        assert together[key]["kl"] == pytest.approx(loss["kl"], rel=1e-3, abs=1e-9), key
        assert together[key]["stderr"] == pytest.approx(loss["stderr"], rel=1e-2, abs=1e-9), key
    assert factor(tmp_path / "out") == pytest.approx(factor(profiled), rel=1e-2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_more_processes_than_sequences(checkpoint, text, tmp_path):
    few = ("--tokens", "24", "--sequence-length", "24")
    result = launched(tmp_path / "out", checkpoint, "--calibration", text, *few)
    assert "2 processes, but only 1 sequences to share" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_published_profile_is_used_by_its_id(checkpoint, profiled, tmp_path):
    """Both the checkpoint and its profile on the Hub: no weight is downloaded."""
    with hub.serving({"openai/tiny": checkpoint, "someone/profile": profiled}) as (endpoint, log):
        shown = subprocess.run(
            [*PROFILE, "openai/tiny", "--json", "--profile", "someone/profile"],
            env=os.environ | hub.hub_environment(endpoint, tmp_path),
            capture_output=True,
            text=True,
            check=False,
        )
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout) == json.loads((profiled / "profile.json").read_text())
    assert not any("importance" in path for _, path, _ in log)


def test_check_says_how_good_it_is(cli, checkpoint, text, profiled):
    result = cli(
        "profile", checkpoint, "-o", profiled, "--calibration", text, *SMALL, "--check", 5, "--json"
    )
    assert result.exit_code == 0, result.output
    check = json.loads(result.stdout)["check"]
    assert check["entries"] == 5
    assert -1 <= check["spearman"] <= 1
    assert check["median_ratio"] > 0
    assert check["seconds_predicted"] > 0
    assert check["seconds_measured"] > 0
    assert len(check["pairs"]) == 5


def test_a_table_for_people_and_a_picture(cli, checkpoint, text, profiled, tmp_path):
    picture = tmp_path / "p.png"
    result = cli(
        "profile", checkpoint, "-o", profiled, "--calibration", text, *SMALL, "--plot", picture
    )
    assert result.exit_code == 0, result.output
    assert "expert_down" in result.stdout
    assert "tokens per expert" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_spearman():
    assert spearman(np.array([1.0, 2, 3]), np.array([10.0, 20, 300])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    assert spearman(np.array([1.0, 1, 2]), np.array([5.0, 5, 9])) == pytest.approx(1)
    assert spearman(np.array([1.0, 1, 1]), np.array([5.0, 6, 9])) == 0


def refusal(cli, *arguments):
    result = cli("profile", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.jsonl", "", "is empty"),
        ("blank.jsonl", '{"text": ""}\n', "less than one sequence"),
        ("one.txt", "w3 w4 w5\n", "has 1 different document, too few"),
        ("one.jsonl", '{"text": "w3 w4"}\n' * 9, "has 1 different document, too few"),
        (
            "short.jsonl",
            "".join(f'{{"text": "w{i}"}}\n' for i in range(3, 9)),
            "documents to calibrate on have less than one sequence of",
        ),
        ("other.jsonl", '{"label": 3}\n', "has no text. .* found 'label'"),
        ("broken.jsonl", '{"text": \n', "cannot be read"),
        ("text.docx", "x", "not a kind of file"),
        ("roles.jsonl", '{"messages": ["hello"]}\n', "no role and content"),
    ],
)
def test_bad_text(cli, checkpoint, tmp_path, name, content, says):
    import re

    (tmp_path / name).write_text(content)
    line = refusal(
        cli, checkpoint, "-o", tmp_path / "out", "--calibration", tmp_path / name, *SMALL
    )
    assert re.search(says, line), line
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--tiers", "q9g1"), "unknown tier"),
        (("--tiers", "bf16"), "needs no measurement"),
        (("--tiers", ","), "is empty"),
        (("--method", "guess"), "Use one of fisher, kl"),
        (("--quantizer", "gptq9"), "Use one of rtn, search, gptq"),
        (("--tokens", "0"), "too small"),
        (("--draws", "0"), "--draws"),
        (("--quantizer", "gptq", "--method", "kl"), "rounds to nearest"),
        (("--calibration", "no-such-file.jsonl"), "neither a file nor a loadable data set"),
    ],
)
def test_bad_options(cli, checkpoint, text, tmp_path, options, says):
    line = refusal(cli, checkpoint, "-o", tmp_path / "out", "--calibration", text, *options)
    assert says in line
    assert list(tmp_path.iterdir()) == []


def test_sequences_longer_than_the_model_takes(cli, text, tmp_path):
    short = tiny.write_gpt_oss(
        tmp_path / "src", config={**tiny.CONFIG, "max_position_embeddings": 16}
    )
    line = refusal(cli, short, "-o", tmp_path / "out", "--calibration", text, *SMALL)
    assert "exceeds the context" in line


def test_a_profile_of_something_else(cli, checkpoint, text, profiled, tmp_path):
    def change(values):
        values["model.norm.weight"][0] += 1

    other = tiny.write_gpt_oss(tmp_path / "other", change)
    before = (profiled / "profile.json").read_bytes()
    line = refusal(cli, other, "-o", profiled, "--calibration", text, *SMALL)
    assert "measured on another model-" in line
    llama = write(tmp_path / "llama", LLAMA)
    assert "another checkpoint" in refusal(cli, llama, "--profile", profiled)
    line = refusal(cli, checkpoint, "-o", profiled, "--calibration", text, *SMALL, "--seed", 7)
    assert "another calibration text" in line
    assert (profiled / "profile.json").read_bytes() == before
    newer = json.loads(before) | {"version": 99}
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "profile.json").write_text(json.dumps(newer))
    assert "version 99" in refusal(cli, checkpoint, "--profile", tmp_path / "new")
    (tmp_path / "new" / "profile.json").write_text(
        json.dumps({"kind": "profile", "version": FORMAT_VERSION})
    )
    assert "not a complete profile" in refusal(cli, checkpoint, "--profile", tmp_path / "new")


def test_values_that_are_not_finite(cli, text, tmp_path):
    def spoil(values):
        values["model.layers.2.self_attn.o_proj.bias"][0] = 0x7FC0

    bad = tiny.write_gpt_oss(tmp_path / "src", spoil)
    line = refusal(cli, bad, "-o", tmp_path / "out", "--calibration", text, *SMALL)
    assert "layer 2 (model.layers.2)" in line
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_source_that_is_gone_for_a_while(cli, checkpoint, text, profiled, tmp_path, monkeypatch):
    """What is measured stays, and the next run goes on from there."""
    options = ("-o", tmp_path / "out", "--calibration", text, *SMALL)
    read, work = os.preadv, tmp_path / "out.partial" / "work"

    def failing(*args):
        if any(work.glob("stage-*")):
            raise OSError(5, "Input/output error")
        return read(*args)

    with monkeypatch.context() as patch:
        patch.setattr("os.preadv", failing)
        assert "cannot be read (Input/output error)" in refusal(cli, checkpoint, *options)
    assert any(work.glob("stage-*"))
    assert cli("profile", checkpoint, *options).exit_code == 0
    assert table(tmp_path / "out") == table(profiled)


def test_a_full_disk(cli, checkpoint, text, tmp_path, monkeypatch):
    """Refused at the start where it is seen, and gone on from where it is not."""
    options = ("-o", tmp_path / "out", "--calibration", text, *SMALL)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
        assert "GB free" in refusal(cli, checkpoint, *options)
    save, calls = np.save, []

    def full(file, values):
        calls.append(1)
        if len(calls) == 7:
            raise OSError(28, "No space left on device")
        save(file, values)

    with monkeypatch.context() as patch:
        patch.setattr("numpy.save", full)
        assert "No space left on device" in refusal(cli, checkpoint, *options)
    assert not (tmp_path / "out").exists()
    result = cli("profile", checkpoint, *options)
    assert result.exit_code == 0, result.output


def test_experts_that_saw_no_token(cli, text, tmp_path):
    """They are counted, and the stack's losses marked as an estimate."""

    def shun(values):
        for layer in range(4):
            values[f"model.layers.{layer}.mlp.router.bias"][3] = 0xC700  # -32768

    source = tiny.write_gpt_oss(tmp_path / "src", shun)
    result = cli("profile", source, "-o", tmp_path / "out", "--calibration", text, *SMALL)
    assert result.exit_code == 0, result.output
    assert "fewer than 16 tokens reached experts 3 (0)" in result.stderr
    made = json.loads((tmp_path / "out" / "profile.json").read_text())
    stack = next(w for w in made["weights"] if w["name"].endswith("experts.up_proj"))
    assert stack["unseen_experts"] == 1
    assert stack["estimated"] is True
    importance = mx.load(str(tmp_path / "out" / "importance.safetensors"))[stack["name"]]
    seen = np.array(made["expert_tokens"][stack["name"]])[:3, None]
    pooled = (np.array(importance)[:3] * seen).sum(axis=0) / seen.sum()
    assert np.allclose(np.array(importance)[3], pooled, rtol=1e-4)


def test_packed_experts_are_probed_alike(checkpoint, monkeypatch):
    """As on a GPU: experts stay packed, and a tier's own kernel computes."""
    tokens = mx.random.randint(0, 64, (1, 20), key=mx.random.key(0))
    entries = [
        e
        for e in candidate_entries(open_source(str(checkpoint)).inventory.weights, ["q3g64"])
        if e.weight.layer == 1 and e.weight.role.startswith("expert")
    ]
    plain = measure_entries(
        StreamingModel(open_source(str(checkpoint))), tokens, entries, lambda _: None
    )
    monkeypatch.setattr("quantkit.streaming.layer_runner.on_cpu", lambda: False)
    packed = measure_entries(
        StreamingModel(open_source(str(checkpoint))), tokens, entries, lambda _: None
    )
    for key, loss in plain.items():
        assert np.allclose(packed[key], loss, rtol=0.02), key


def test_calibrated_rounding_is_probed(cli, checkpoint, text, profiled, tmp_path):
    """Layers lose less than to nearest; the embedding and the head are rounded to nearest."""
    out = tmp_path / "p"
    options = ("-o", out, "--calibration", text, *SMALL, "--quantizer", "gptq")
    result = cli("profile", checkpoint, *options)
    assert result.exit_code == 0, result.output
    nearest, better = table(profiled), table(out)
    assert better.keys() == nearest.keys()
    inside = [key for key in nearest if ".layers." in key[0] and key[1] in ("q3g64", "q2g64")]
    ratios = [better[key]["kl"] / nearest[key]["kl"] for key in inside]
    assert np.median(ratios) < 0.7
    head = [key for key in nearest if key[0] == "lm_head"]
    assert head
    assert all(np.isclose(better[key]["kl"], nearest[key]["kl"], rtol=1e-4) for key in head)
    assert json.loads((out / "profile.json").read_text())["quantizer"] == "gptq"


def test_from_python(checkpoint, text, profiled, tmp_path):
    import quantkit

    settings = quantkit.ProfileSettings(
        quantkit.CalibrationSpec(str(text), 96, 24), ("q8g32", "q3g64", "q2g64")
    )
    source = quantkit.open_source(str(checkpoint))
    made = quantkit.profile(source, tmp_path / "p", settings)
    assert made == quantkit.load_profile(str(profiled), source.inventory)


def test_the_default_tiers_are_those_that_can_matter(checkpoint):
    """Affine ones, floats of 4 bits for embeddings, routers in 8 bits; more of them on demand."""
    import quantkit

    weights = quantkit.open_source(str(checkpoint)).inventory.weights

    def tiers_of(role, **settings):
        entries = quantkit.ProfileSettings(**settings).entries(weights)
        return {e.tier.name for e in entries if e.weight.role == role}

    one_bit = {"q1g32", "q1g64", "q1g128"}
    affine = {"q8g64", "q6g64", "q5g64", "q4g32", "q4g64", "q3g32", "q3g64", "q2g32", "q2g64"}
    assert tiers_of("q") == tiers_of("lm_head") == affine
    assert tiers_of("embedding") == affine | {"nvfp4", "mxfp4"}
    assert tiers_of("expert_up") == {"q3g32", "q3g64", "q2g32", "q2g64", *one_bit}
    assert tiers_of("router") == {"q8g64"}
    assert tiers_of("router", routers=True) == affine
    assert tiers_of("router", more_tiers=("nvfp4",)) == {"q8g64", "nvfp4"}
    every = affine | one_bit | {"nvfp4", "mxfp4", "mxfp8"}
    assert tiers_of("q", tiers=parse_tiers("all")) == every
    assert tiers_of("router", tiers=("q3g64",)) == {"q3g64"}
