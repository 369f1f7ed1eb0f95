"""Every command on a checkpoint that is gpt-oss in all but size, with defaults where it can be."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from typer.testing import CliRunner

from tests.support import standin

FEW = ("--tokens", 256, "--sequence-length", 64)
# To measure and round 201,088 rows takes a minute; the other vocabulary goes through all of it.
AS_THEY_ARE = ("--pin", "lm_head=native", "--pin", "embedding=native")


@pytest.fixture(scope="module", params=["published", "own"])
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "gpt-oss"
    if request.param == "own":
        return standin.write_own(folder)
    if not standin.PUBLISHED.is_dir():
        pytest.skip(f"NOT TESTED on the published tokenizer and template: no {standin.PUBLISHED}")
    return standin.write_published(folder)


@pytest.fixture(scope="module")
def run(source):
    from quantkit.cli.main import app

    def run(*arguments, typed=None):
        done = CliRunner().invoke(app, [str(a) for a in arguments], input=typed)
        assert done.exit_code == 0, done.output
        return done

    return run


@pytest.fixture(scope="module")
def profile(run, source):
    out = source.with_name("profile")
    run("profile", source, "-o", out, *FEW, "--tiers", "q3g64")
    return out


@pytest.fixture(scope="module")
def quant(run, source):
    out = source.with_name("quant")
    run("quantize", source, "-r", "mxfp4-q8", "-o", out)
    return out


def is_large(source):
    return json.loads((source / "config.json").read_text())["vocab_size"] == 201_088


def test_inspect(run, source):
    assert "gpt_oss, 2 layers, 8 experts, 4 per token" in run("inspect", source).stdout


def test_profile(run, source, profile):
    value = json.loads((profile / "profile.json").read_text())
    assert any(loss["kl"] > 0 for weight in value["weights"] for loss in weight["costs"].values())
    assert value["calibration"]["name"] == "default"
    assert value["calibration"]["skipped_rows"] == 0


def test_plan(run, source, profile):
    assert "proven" in run("plan", source, "--profile", profile, "-b", "12bpw").stdout
    assert "mxfp4" in run("plan", source, "-r", "mxfp4-q8").stdout


def test_the_main_job(run, source, request):
    """A budget and nothing else: the profile is made, the rounding is gptq, the text ours."""
    out = source.with_name("main")
    options = ("-b", "9bpw", "--tokens", 64, "--quantizer-tokens", 256)
    if is_large(source):
        profile = request.getfixturevalue("profile")
        options = ("-b", "15.89bpw", "--profile", profile, *AS_THEY_ARE, *options[2:])
    done = run("quantize", source, "-o", out, *options)
    assert "gptq" in done.stdout
    assert "8 of 8 checks passed" in run("verify", out).stdout


def test_tuning(run, source, profile):
    out = source.with_name("tuned")
    options = ("--quantizer-tokens", 256, "--tune", 1, *(AS_THEY_ARE if is_large(source) else ()))
    budget = "15.89bpw" if is_large(source) else "9bpw"
    run("quantize", source, "-b", budget, "--profile", profile, "-o", out, *options)
    assert json.loads((out / "quantkit.json").read_text())["plan"]["tuning_steps"] == 1


def test_verify_and_report(run, quant):
    assert "8 of 8 checks passed" in run("verify", quant).stdout
    assert "bits per weight" in run("report", quant).stdout


def test_compare(run, source, quant):
    found = json.loads(run("compare", source, quant, *FEW, "--json").stdout)
    assert 0 < found["results"][0]["kl_mean"] < 0.1
    assert "chat" in found["results"][0]["texts"]


def test_generate(run, quant):
    done = run("generate", quant, "-p", "Hi", "--reasoning", "low", "--max-tokens", 3, "--json")
    assert json.loads(done.stdout)["truncated"] in (True, False)
    assert "does not read a reasoning effort" not in done.stderr


def test_chat(run, quant):
    run("chat", quant, "--system", "Be kind.", "--max-tokens", 3, typed="Hi\nAnd you?\n\n")


def test_bench(run, quant):
    assert "tok/s" in run("bench", quant, "--context", "16", "--tokens", 16).stdout


def test_upload(run, quant):
    shown = run("upload", quant, "user/gpt-oss", "--dry-run").stdout
    assert "chat_template.jinja" in shown
    assert "Nothing was sent" in shown


def test_serve(quant):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "quantkit", "serve", str(quant), "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
            answer = ask(f"http://127.0.0.1:{port}/v1/chat/completions", asked)
        finally:
            server.send_signal(signal.SIGINT)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert server.returncode == 0


def ask(url, value):
    request = urllib.request.Request(
        url, json.dumps(value).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(300):
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.loads(reply.read())
        except urllib.error.URLError:
            time.sleep(0.1)
    raise TimeoutError(url)
