"""Models without channels, real ones, the fit to mlx-lm, and its end."""

import signal
import subprocess
import sys
import time

import openai
import pytest
from mlx_lm.models.cache import LRUPromptCache

from quantkit.demo.build import plain_checkpoint
from quantkit.errors import InputError, OutputError
from quantkit.serving.engine import Engine
from tests.support import served, standin

TAKEN = """
import socket, sys
from quantkit.serving.app import Address, run
from quantkit.serving.turns import open_service
service = open_service(sys.argv[1])
taken = socket.create_server(("127.0.0.1", 0))
run(service, Address(port=taken.getsockname()[1]))
"""
LOADING = """
import sys, time
from quantkit.serving import engine
from quantkit.serving.app import end_at_once
from quantkit.serving.turns import open_service
def load(*_, **__):
    print("loading", flush=True)
    time.sleep(600)
engine.load_stock = load
end_at_once()
open_service(sys.argv[1])
"""
UNSOUND = """
import sys
from quantkit.serving import turns
def refuse(*_):
    raise ValueError("no prompts")
turns.open_prompts = refuse
turns.open_service(sys.argv[1])
"""
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def expected():
    """What mlx-lm itself answers."""
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(plain_checkpoint()))
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)
    return mlx_lm.generate(model, tokenizer, prompt, max_tokens=12)


@pytest.fixture(scope="module")
def llama():
    with served.serve(plain_checkpoint()) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def test_a_model_without_channels_answers_in_both_protocols(llama, expected):
    said = llama.chat.completions.create(model="m", messages=QUESTION, temperature=0, max_tokens=12)
    assert said.choices[0].message.content == expected
    chunks = llama.chat.completions.create(
        model="m", messages=QUESTION, temperature=0, max_tokens=12, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    answer = llama.responses.create(model="m", input=QUESTION, temperature=0, max_output_tokens=12)
    assert answer.output_text == expected


def test_a_prompt_that_was_read_to_its_end_is_answered_again(llama):
    """An answer of one token leaves the very prompt in the cache."""
    for _ in range(3):
        said = llama.chat.completions.create(
            model="m", messages=QUESTION, temperature=0, max_tokens=1
        )
        assert said.choices[0].message.content


def test_a_seeded_answer_counts_the_tokens_that_were_read_before(llama, monkeypatch):
    fetch = LRUPromptCache.fetch_nearest_cache

    def slowly(*arguments):
        time.sleep(0.2)
        return fetch(*arguments)

    monkeypatch.setattr(LRUPromptCache, "fetch_nearest_cache", slowly)
    for _ in range(2):
        said = llama.chat.completions.create(model="m", messages=QUESTION, seed=1, max_tokens=2)
    assert said.usage.prompt_tokens_details.cached_tokens >= said.usage.prompt_tokens - 2


def test_a_vocabulary_of_another_kind_is_prompted_by_its_template(tmp_path):
    """It has channels, but not the vocabulary that openai-harmony knows."""
    with served.serve(standin.write_own(tmp_path / "own")) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        said = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "Hi"}], max_tokens=4
        )
        assert said.usage.completion_tokens >= 1


def test_a_repo_that_does_not_load_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="mlx-lm does not load it"):
        Engine(str(tmp_path))
    with pytest.raises(OutputError, match="neither a folder nor a Hub id"):
        Engine(str(tmp_path / "none"))


@pytest.mark.parametrize("missing", ["TextStateMachine", "TextStateMachine.split"])
def test_an_old_mlx_lm_is_one_line(monkeypatch, tmp_path, missing):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.delattr(f"mlx_lm.server.{missing}")
    message = r"needs mlx-lm 0\.32\.1 or newer, which needs Python 3\.11"
    with pytest.raises(InputError, match=message):
        Engine(str(tmp_path))


@pytest.fixture
def started():
    processes = []

    def start(script):
        command = [sys.executable, "-c", script, str(plain_checkpoint())]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("script", "says"), [(TAKEN, b"in use"), (UNSOUND, b"no prompts")])
def test_a_server_that_cannot_begin_ends(started, script, says):
    process = started(script)
    _, errors = process.communicate(timeout=60)
    assert process.returncode
    assert says in errors


def test_a_server_that_still_loads_ends_when_it_is_told(started):
    process = started(LOADING)
    assert process.stdout.readline() == b"loading\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 0
