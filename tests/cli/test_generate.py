"""Answers, told apart by channel, and served."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import mlx_lm
import pytest
from mlx_lm.utils import load_tokenizer

from quantkit.generation.harmony import Channels, Delta
from tests.support import standin

WORDS = ["analysis", "final", "commentary", "assistant", "Paris", "of", "course", "hm"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Bytes, a few words, and gpt-oss's marks as special tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    standin.write_tokenizer(folder, tuple(WORDS))
    return load_tokenizer(folder)


def ids(tokenizer, *parts):
    known = tokenizer.get_vocab()
    return [i for p in parts for i in ([known[p]] if p in known else tokenizer.encode(p))]


def said(tokenizer, *parts):
    found = {}
    for delta in Channels(tokenizer).deltas(ids(tokenizer, *parts)):
        found[delta.channel] = found.get(delta.channel, "") + delta.text
    return found


CASES = {
    "both channels": (
        ("<|channel|>", "analysis", "<|message|>", "hm", "<|end|>", "<|start|>", "assistant",
         "<|channel|>", "final", "<|message|>", "Paris"),
        {"analysis": "hm", "final": "Paris"},
    ),
    "a call is no answer": (
        ("<|channel|>", "commentary to=f", "<|message|>", "{}", "<|end|>"), {"commentary": "{}"},
    ),
    "no channel at all": (("Paris",), {"final": "Paris"}),
    "a message of no channel": (("<|message|>", "Paris", "<|end|>"), {"final": "Paris"}),
    "cut while it thinks": (("<|channel|>", "analysis", "<|message|>", "hm"), {"analysis": "hm"}),
    "cut in a mark": (("<|channel|>", "analysis"), {}),
    "the marks' words as text": (
        ("<|channel|>", "final", "<|message|>", "<", "|", "e", "n", "d", "|", ">"),
        {"final": "<|end|>"},
    ),
    "letters of several bytes": (
        ("<|channel|>", "final", "<|message|>", "é🙂", "<|end|>"), {"final": "é🙂"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_channels(tokenizer, case):
    parts, expected = CASES[case]
    assert said(tokenizer, *parts) == expected


def test_pieces_come_as_they_are_said(tokenizer):
    parts = ("<|channel|>", "final", "<|message|>", "Paris", "of", "course")
    deltas = Channels(tokenizer).deltas(ids(tokenizer, *parts))
    assert next(deltas) == Delta("final", "Paris")


@pytest.fixture(scope="module")
def out(tmp_path_factory, quant):
    return shutil.copytree(quant, tmp_path_factory.mktemp("repo") / "out")


def test_generate_is_mlx_lms_own(cli, out):
    done = cli("generate", out, "-p", "The w5", "--max-tokens", 5, "--json")
    assert done.exit_code == 0, done.output
    model, tokenizer = mlx_lm.load(str(out))
    expected = mlx_lm.generate(model, tokenizer, tokenizer.encode("The w5"), max_tokens=5)
    value = json.loads(done.stdout)
    assert value["answer"] == expected
    assert value["truncated"]
    shown = cli("generate", out, "-p", "The w5", "--max-tokens", 5, "--reasoning", "low")
    assert shown.stdout.strip() == expected.strip()
    assert "cut after 5 tokens" in shown.stderr
    assert "does not read a reasoning effort" in shown.stderr


def test_generate_prints_the_answer_alone(cli, out, monkeypatch):
    """In a pipe, what was thought is left out."""
    from quantkit.generation import chat_model as answer

    deltas = [Delta("analysis", "hm"), Delta("final", "Paris")]
    monkeypatch.setattr(answer.ChatModel, "answer", lambda *_: iter(deltas))
    assert cli("generate", out, "-p", "?").stdout == "Paris\n"
    value = json.loads(cli("generate", out, "-p", "?", "--json").stdout)
    assert value["channels"] == {"analysis": "hm", "final": "Paris"}
    monkeypatch.setattr(answer.ChatModel, "answer", lambda *_: iter(deltas[:1]))
    assert "never reached its final channel" in cli("generate", out, "-p", "?").stderr


def test_chat_keeps_what_was_said(cli, out, monkeypatch):
    from typer.testing import CliRunner

    from quantkit.cli.main import app
    from quantkit.generation import chat_model as answer

    heard = []

    def reply(self, messages, sampling):
        heard.append(list(messages))
        return iter([Delta("analysis", "hm"), Delta("final", f"answer {len(messages)}")])

    monkeypatch.setattr(answer.ChatModel, "answer", reply)
    done = CliRunner().invoke(
        app, ["chat", str(out), "--system", "Be kind."], input="a\nb\n/new\nc\n\n"
    )
    assert done.exit_code == 0, done.output
    roles = [[m["role"] for m in messages] for messages in heard]
    assert roles[0] == ["system", "user"]
    assert roles[1] == ["system", "user", "assistant", "user"]
    assert heard[1][2]["content"] == "answer 2"
    assert [m["content"] for m in heard[2]] == ["Be kind.", "c"]


def test_serve_answers(out):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "quantkit", "serve", str(out), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        asked = {"messages": [{"role": "user", "content": "The"}], "max_tokens": 3}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        deadline = time.monotonic() + 60
        while True:
            assert server.poll() is None, server.stderr.read()
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    value = json.load(response)
                break
            except urllib.error.URLError:
                assert time.monotonic() < deadline
                time.sleep(0.2)
    finally:
        server.send_signal(signal.SIGINT)
        try:
            said = server.communicate(timeout=60)[1]
        finally:
            server.kill()
    assert value["choices"][0]["message"]["content"]
    assert "Traceback" not in said
    assert server.returncode == 0


def test_a_port_that_is_taken(out):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "quantkit", "serve", str(out), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "cannot be bound" in done.stderr


BAD = {
    "no such folder": (("generate", "nowhere", "-p", "x"), "neither a folder"),
    "nothing to serve": (("serve", "nowhere"), "neither a folder"),
    "another effort": (("generate", "OUT", "-p", "x", "--reasoning", "much"), "low, medium, high"),
    "no model in the folder": (("chat", "EMPTY"), "not a model"),
    "no model to serve": (("serve", "EMPTY"), "not a model"),
    "no such host": (
        ("serve", "OUT", "--host", "256.256.256.256", "--api-key", "k"),
        "cannot be bound",
    ),
    "a host for all": (("serve", "OUT", "--host", "0.0.0.0"), "needs an --api-key"),
    "an empty prompt": (("generate", "OUT", "-p", ""), "the prompt is empty"),
    "no text": (("generate", "OUT", "-p", "\udce9"), "not UTF-8"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(cli, out, tmp_path, case):
    arguments, message = BAD[case]
    places = {"OUT": out, "EMPTY": tmp_path}
    done = cli(*(places.get(argument, argument) for argument in arguments))
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_bench_records_what_it_measured(cli, out, tmp_path):
    copy = shutil.copytree(out, tmp_path / "out")
    done = cli("bench", copy, "--context", "8,16", "--tokens", 16, "--record", "--json")
    assert done.exit_code == 0, done.output
    runs = json.loads(done.stdout)["runs"]
    assert [run["context"] for run in runs] == [8, 16]
    stored = json.loads((copy / "quantkit.json").read_text())
    assert stored["speed"]["runs"] == runs
    for run in runs:
        assert run["generated"] == 16
        assert run["peak_bytes"] >= stored["total_bytes"]
        assert run["predicted_bytes"] > stored["total_bytes"]
        assert run["generated_per_second"] > 0
        assert f"{run['prefill_per_second']:.1f}" in (copy / "README.md").read_text()
    shown = cli("bench", copy, "--context", "8", "--tokens", 16)
    assert "8 tokens" in shown.stdout
    assert cli("verify", copy).exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--context", "x"), "not a number of tokens"),
        (("--context", "0"), "must be 1 or more"),
        (("--context", "999999999999"), "exceed the"),
        (("--tokens", "1"), "16"),
    ],
)
def test_bench_refuses(cli, out, options, message):
    done = cli("bench", out, *options)
    assert done.exit_code == 2
    assert message in done.stderr
