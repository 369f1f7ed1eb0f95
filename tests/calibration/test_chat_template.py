"""Chat messages of every form, through gpt-oss's own template and one like it."""

import json
import os
import subprocess
import sys
from datetime import date
from itertools import permutations
from pathlib import Path

import pytest
from mlx_lm.utils import load_tokenizer

from quantkit.calibration.calibration_set import CalibrationSpec, read_calibration_set
from quantkit.calibration.chat_template import NoTextError, normalize_messages, render_chat
from quantkit.checkpoint.source import open_source
from quantkit.errors import InputError
from tests.support import standin, tiny

DAY = date(2025, 8, 5)
USER = {"role": "user", "content": "2 + 2?"}
CALL = {"name": "add", "arguments": {"a": 2, "b": 2}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a"],
            },
        },
    }
]


@pytest.fixture(scope="module", params=["published", "own"])
def folder(request, tmp_path_factory):
    if request.param == "own":
        folder = tmp_path_factory.mktemp("tokenizer")
        standin.write_tokenizer(folder)
        return folder
    if not standin.PUBLISHED.is_dir():
        pytest.skip(f"NOT TESTED on the published template: no {standin.PUBLISHED}")
    return standin.PUBLISHED


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def render(tokenizer):
    return lambda messages, **more: render_chat(tokenizer, normalize_messages(messages), **more)


def test_the_date_is_pinned(render):
    pinned, today = render([USER], today=DAY), render([USER])
    assert "Current date: 2025-08-05\n" in pinned
    assert f"Current date: {date.today():%Y-%m-%d}\n" in today
    assert pinned == today.replace(f"{date.today():%Y-%m-%d}", "2025-08-05")


def test_the_prompt_is_the_template_s_own(render, tokenizer):
    """But for the date, what is rendered is what transformers itself renders."""
    own = tokenizer.apply_chat_template(
        [USER], tokenize=False, add_generation_prompt=True, reasoning_effort="high"
    )
    found = render(
        [USER],
        add_generation_prompt=True,
        variables={"reasoning_effort": "high"},
        today=date.today(),
    )
    assert found == own
    assert "Reasoning: high" in found


DIRECTIVES = ["%Y", "%y", "%m", "%d", "%-d", "%B", "%b", "%A", "%a", "%j", "%H:%M:%S", "%d %b %Y"]


@pytest.mark.parametrize("form", DIRECTIVES)
def test_every_form_of_the_date(tokenizer, form, monkeypatch):
    """Top-level and inside of macros, and where the template asks whether the function is there."""
    template = (
        "\n{% macro inner() %}{{ strftime_now('" + form + "') }}{% endmacro %}{{ inner() }}|"
        "{% if strftime_now is defined %}{{ strftime_now('" + form + "') }}{% endif %}"
    )
    monkeypatch.setattr(tokenizer._tokenizer, "chat_template", template)
    expected = DAY.strftime(form)
    # What comes before a template's first tag stays, a newline too.
    assert render_chat(tokenizer, [USER], today=DAY) == f"\n{expected}|{expected}"


WHOLE = {
    "tool calls with an object": {"tool_calls": [{"type": "function", "function": CALL}]},
    "tool calls with a JSON string": {
        "tool_calls": [{"function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}]
    },
    "flat tool calls": {"tool_calls": [CALL]},
    "content that is null": {"content": None, "tool_calls": [{"function": CALL}]},
}


@pytest.mark.parametrize("case", WHOLE)
def test_tool_calls_and_results(render, case):
    call = {"role": "assistant", "thinking": "Adding.", **WHOLE[case]}
    result = {"role": "tool", "name": "add", "content": "4"}
    found = render([USER, call, result], tools=TOOLS, today=DAY)
    assert "type add = (_: {" in found
    assert "<|channel|>analysis<|message|>Adding.<|end|>" in found
    assert 'to=functions.add<|channel|>commentary json<|message|>{"a": 2, "b": 2}<|call|>' in found
    assert '<|start|>functions.add to=assistant<|channel|>commentary<|message|>"4"<|end|>' in found
    assert "None" not in found


@pytest.mark.parametrize("name", ["thinking", "reasoning_content", "reasoning"])
def test_thinking_by_any_name(render, name):
    found = render([USER, {"role": "assistant", name: "Easy.", "content": "4"}], today=DAY)
    assert found.endswith(
        "<|channel|>analysis<|message|>Easy.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>4<|return|>"
    )


SAME = {
    "parts": [{"role": "user", "content": [{"type": "text", "text": "2 +"}, {"text": " 2?"}]}],
    "ShareGPT": [{"from": "human", "value": "2 + 2?"}],
    "keys that are null": [{**USER, "name": None, "tool_calls": None, "thinking": None}],
    "an empty list of calls": [{**USER, "tool_calls": []}],
}


@pytest.mark.parametrize("case", SAME)
def test_forms_that_mean_the_same(render, case):
    assert render(SAME[case], today=DAY) == render([USER], today=DAY)


def test_other_keys_reach_the_template():
    given = {**USER, "name": "Ann", "weight": 1, "annotations": [{"a": None, "b": 2}]}
    (found,) = normalize_messages([given])
    assert found == {**USER, "name": "Ann", "weight": 1, "annotations": [{"b": 2}]}
    assert given["annotations"] == [{"a": None, "b": 2}]  # and the row is left as it is


@pytest.mark.parametrize(
    "content", [None, [], [{"type": "image_url", "image_url": "x"}], [{"text": None}], {"a": 1}]
)
def test_messages_without_text(content):
    with pytest.raises(NoTextError):
        normalize_messages([{"role": "user", "content": content}])


@pytest.mark.parametrize("message", ["hello", {}, {"content": "a"}, {"role": 3, "content": "a"}])
def test_what_is_no_message(message):
    with pytest.raises(InputError, match="has no role and content"):
        normalize_messages([message])


RAISES = {
    "its own error": "{{ raise_exception('no tools here') }}",
    "an undefined value": "{{ messages[0].content + nothing.at.all }}",
    "a wrong type": "{{ messages[0].content + 3 }}",
    "a division": "{{ 1 // 0 }}",
    "a key": "{{ {}['a'].b }}",
    "no template at all": "{% if %}",
    "a recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "what the sandbox forbids": "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}",
}


@pytest.mark.parametrize("case", RAISES)
def test_a_template_that_raises_is_one_line(cli, tmp_path, case):
    source = tiny.write_gpt_oss(tmp_path / "src")
    (source / "chat_template.jinja").write_text(RAISES[case])
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"messages": [USER]}) + "\n")
    done = cli("profile", source, "-o", tmp_path / "out", "--calibration", text)
    assert done.exit_code == 2, done.output
    assert done.stderr.count("\n") == 1, done.stderr
    assert "the chat template cannot render it" in done.stderr
    assert not list(tmp_path.glob("out*"))


WORDS = ("w5", "w6", "w7", "w8", "w9")
ROWS = {
    "a chat with null content": {"messages": [{"role": "user", "content": None}]},
    "a chat with an image": {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
    "no chat": {"messages": None},
    "an empty chat": {"messages": []},
}


def test_rows_without_text_are_skipped_and_counted(tmp_path, checkpoint):
    rows = [
        {"messages": [{"role": "user", "content": f"w{i} w{i + 1} w{i + 2} " * 20}]}
        for i in range(5, 25)
    ]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS.values(), *rows]))
    source = open_source(str(checkpoint))
    found = read_calibration_set(source.checkpoint, CalibrationSpec(str(text), 100_000, 8))
    assert found.text.skipped_rows == len(ROWS)
    assert len(found.tokens) > 10


@pytest.mark.parametrize("text", [None, ""])
def test_null_text_is_never_the_word_none(tmp_path, checkpoint, text, cli):
    rows = [{"text": text}, *({"text": " ".join(some)} for some in permutations(WORDS))]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(str(checkpoint))
    found = read_calibration_set(source.checkpoint, CalibrationSpec(str(path), 100_000, 8))
    assert found.text.skipped_rows == 1
    assert set(found.tokens.ravel().tolist()) <= {5, 6, 7, 8, 9}
    assert len(found.tokens) > 20
    done = cli("profile", checkpoint, "-o", tmp_path / "out", "--calibration", path, "--tokens", 64,
               "--sequence-length", 8, "--tiers", "q8g64")  # fmt: skip
    assert "text.jsonl: skipped 1 rows without text" in done.stderr


def test_nothing_but_rows_without_text(tmp_path, checkpoint, cli):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": null}\n' * 3)
    done = cli("profile", checkpoint, "-o", tmp_path / "out", "--calibration", path)
    assert done.exit_code == 2
    assert "(3 rows without text were skipped)" in done.stderr


OLDEST, NEWEST = "5.0.0", "5.24.0"  # that mlx-lm allows, and that was there when this was written
OTHER_VERSION = """
import json, sys
from datetime import date
from pathlib import Path
from quantkit.calibration.chat_template import normalize_messages, render_chat
import transformers
from transformers import PreTrainedTokenizerFast
assert transformers.__version__ == sys.argv[1], transformers.__version__
tokenizer = PreTrainedTokenizerFast(tokenizer_file=sys.argv[2] + "/tokenizer.json")
tokenizer.chat_template = open(sys.argv[2] + "/chat_template.jinja").read()
messages, tools = json.loads(sys.argv[3])
sys.stdout.write(render_chat(tokenizer, normalize_messages(messages), tools=tools,
                             today=date(2025, 8, 5)))
"""


@pytest.mark.versions
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_the_same_under_other_versions_of_transformers(folder, render, tmp_path_factory, version):
    """Messages that use all there is, under the oldest and the newest transformers."""
    packages = tmp_path_factory.mktemp("transformers")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(packages)]
    subprocess.run([*install, f"transformers=={version}"], check=True)
    call = {"role": "assistant", "thinking": "Adding.", **WHOLE["tool calls with a JSON string"]}
    result = {"role": "tool", "name": "add", "content": "4"}
    last = {"role": "assistant", "reasoning_content": "So.", "content": [{"text": "4"}]}
    messages = [{"role": "system", "content": "Be kind."}, USER, call, result, USER, last]
    command = [sys.executable, "-c", OTHER_VERSION, version, str(folder)]
    path = os.pathsep.join([str(packages), str(Path.cwd())])
    done = subprocess.run(
        [*command, json.dumps([messages, TOOLS])],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == render(messages, tools=TOOLS, today=DAY)


CALLS = [{"function": CALL}]
UNUSABLE = {
    "calls that are no list": {"role": "assistant", "content": "x", "tool_calls": 5},
    "a call that is not an object": {"role": "assistant", "content": "x", "tool_calls": ["add"]},
    "a result without a call": {"role": "tool", "content": "4"},
    "content and thinking beside calls": {
        "role": "assistant", "content": "x", "thinking": "y", "tool_calls": CALLS,
    },
}  # fmt: skip
USABLE = {
    "calls as a JSON string": {"role": "assistant", "content": "", "tool_calls": json.dumps(CALLS)},
    "thinking in parts": {"role": "assistant", "content": "4", "thinking": [{"text": "Easy."}]},
    "arguments that are null": {
        "role": "assistant", "content": "",
        "tool_calls": [{"function": {"name": "add", "arguments": None}}],
    },
}  # fmt: skip


ASKED = [{"messages": [{"role": "user", "content": f"What is {n} and {n}?"}]} for n in range(12)]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A tiny gpt-oss with a template that is strict, and a way to read rows with it."""
    source = open_source(str(standin.write_own(tmp_path_factory.mktemp("chats") / "gpt-oss")))

    def read(folder, rows):
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        spec = CalibrationSpec(str(path), 100_000, 32)
        return read_calibration_set(source.checkpoint, spec)

    return read


@pytest.mark.parametrize("case", [*UNUSABLE, *USABLE])
def test_one_row_does_not_end_the_run(chats, tmp_path, case):
    row = {"messages": [USER, {**UNUSABLE, **USABLE}[case]]}
    found = chats(tmp_path, [*ASKED, row])
    assert found.text.skipped_rows == (case in UNUSABLE)


@pytest.mark.parametrize("case", UNUSABLE)
def test_nothing_but_rows_that_cannot_be_rendered_is_an_error(chats, tmp_path, case):
    with pytest.raises(InputError, match="rows.jsonl, column messages: "):
        chats(tmp_path, [{"messages": [USER, UNUSABLE[case]]}] * 3)


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), None, "[]", []])
def test_tools_of_a_row_in_any_form(chats, tmp_path, tools):
    rows = [{**asked, "tools": tools} for asked in ASKED]
    found = chats(tmp_path, rows)
    assert found.text.skipped_rows == 0
    assert len(found.tokens)


def test_messages_as_a_json_string(chats, tmp_path):
    plain = chats(tmp_path, ASKED)
    packed = chats(tmp_path, [{"messages": json.dumps(row["messages"])} for row in ASKED])
    assert packed.text.sha256 == plain.text.sha256


def test_json_that_no_reader_takes(cli, checkpoint, tmp_path):
    path = tmp_path / "deep.jsonl"
    path.write_text('{"text":' + "[" * 3000 + "]" * 3000 + "}\n")
    done = cli("profile", checkpoint, "-o", tmp_path / "out", "--calibration", path)
    assert done.exit_code == 2, done.output
    assert done.stderr.count("\n") == 1
