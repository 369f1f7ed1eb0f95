"""Traces: a model's own answers, in batches, resumable, as text for everything else."""

import json

import pytest

from quantkit.backend import mx  # noqa: F401  (before mlx-lm)
from quantkit.calibration.calibration_set import (
    CalibrationSpec,
    load_tokenizer,
    read_calibration_set,
)
from quantkit.calibration.splits import SPLITS
from quantkit.checkpoint.source import open_source
from quantkit.generation.chat_model import SamplingParameters
from quantkit.generation.harmony import Channels, Delta
from quantkit.jobs.traces import _PROMPTS, TraceSettings, _message, write_traces
from quantkit.progress import Progress
from tests.support import standin

SAMPLING = ("--temp", "1", "--max-tokens", "300", "--seed", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny gpt-oss that babbles."""
    return standin.write_own(tmp_path_factory.mktemp("model") / "gpt-oss")


@pytest.fixture(scope="module")
def traced(cli_once, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("traces") / "traces.jsonl"
    result = cli_once("traces", model, "-o", out, *SAMPLING, "--json")
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


@pytest.fixture(scope="module")
def cli_once():
    from typer.testing import CliRunner

    from quantkit.cli.main import app

    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def test_every_prompt_that_was_answered_is_there(traced):
    out, told = traced
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    prompts = [json.loads(line) for line in _PROMPTS.read_text().splitlines()]
    assert len(rows) == told["answered"] > 10
    assert told["answered"] + told["truncated"] == len(prompts)
    asked = [prompt["messages"][0]["content"] for prompt in prompts]
    for row in rows:
        question, answer = row["messages"]
        assert question["content"] in asked
        assert answer["role"] == "assistant"
        assert answer["content"] or answer["tool_calls"]
    assert not out.with_name("traces.jsonl.partial").exists()


def test_prompts_are_of_all_kinds_and_some_have_tools():
    prompts = [json.loads(line) for line in _PROMPTS.read_text().splitlines()]
    kinds = [prompt["kind"] for prompt in prompts]
    assert min(kinds.count(kind) for kind in ("prose", "code", "chat", "maths", "tools")) > 10
    assert all(("tools" in prompt) == (prompt["kind"] == "tools") for prompt in prompts)


def test_they_are_text_for_everything_else(traced, model):
    checkpoint = open_source(str(model)).checkpoint
    for split in SPLITS:
        text = read_calibration_set(checkpoint, CalibrationSpec(str(traced[0]), 2048, 64), split)
        assert text.text.documents >= 1
        assert text.text.skipped_rows == 0


class Killed(Progress):
    """Ends the run after the first batch."""

    def stage(self, title, total, unit="bytes"):
        done = [0]

        def advance(more, name):
            done[0] += more
            if done[0]:
                raise KeyboardInterrupt

        return advance


def test_a_killed_run_goes_on(model, tmp_path):
    """From its whole lines: a torn one is answered again."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(_PROMPTS.read_text().splitlines(keepends=True)[:20]))
    settings = TraceSettings(few, SamplingParameters(max_tokens=300, temperature=1.0))
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    write_traces(str(model), whole, settings)
    with pytest.raises(KeyboardInterrupt):
        write_traces(str(model), out, settings, progress=Killed())
    assert not out.exists()
    partial = tmp_path / "out.jsonl.partial"
    begun = partial.read_text().splitlines()
    assert len(begun) == 9
    partial.write_text("\n".join(begun) + '\n{"messages": [')
    write_traces(str(model), out, settings)
    assert out.read_text() == whole.read_text()


def test_another_run_is_not_gone_on_with(cli_once, model, tmp_path):
    out = tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text('{"key": "another"}\n')
    refused = cli_once("traces", model, "-o", out, *SAMPLING)
    assert refused.exit_code == 2
    assert "was begun with another model" in refused.stderr
    out.write_text("mine")
    refused = cli_once("traces", model, "-o", out, *SAMPLING)
    assert refused.exit_code == 2
    assert "exists. Choose another file, or replace it with --force" in refused.stderr
    assert out.read_text() == "mine"


def test_an_answer_with_thinking_and_a_call(model):
    tokenizer = load_tokenizer(open_source(str(model)).checkpoint)
    text = (
        "<|channel|>analysis<|message|>Let me look.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>'
    )
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert _message(list(Channels(tokenizer).deltas(tokens))) == {
        "role": "assistant",
        "content": "",
        "thinking": "Let me look.",
        "tool_calls": [
            {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
        ],
    }
    assert _message([Delta("analysis", "Hm.")]) is None
    assert _message([Delta("commentary", "{broken", "functions.add")]) is None


BAD = {
    "no such file": (None, "cannot be read"),
    "no JSON": ("hello\n", "line 1: not JSON"),
    "no prompt": ('{"text": "x"}\n', "line 1: has no prompt and no messages"),
    "nothing": ("", "is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_prompts_that_cannot_be_read(cli_once, model, tmp_path, case):
    content, message = BAD[case]
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    result = cli_once("traces", model, "-o", tmp_path / "out.jsonl", "--prompts", path)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_no_answer_ends(cli_once, model, tmp_path):
    result = cli_once("traces", model, "-o", tmp_path / "out.jsonl", "--max-tokens", 1)
    assert result.exit_code == 2
    assert "no answer ended within 1 tokens. Raise --max-tokens" in result.stderr
    assert list(tmp_path.iterdir()) == []
