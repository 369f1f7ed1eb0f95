"""Options declared once, and the help that shows them."""

import re

import pytest
import typer

from quantkit.cli.expand import Command, option_names, with_flags
from quantkit.cli.main import app

COMMANDS = typer.main.get_command(app).commands
SCREEN = 60  # lines


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_one_screen_and_help_all_is_all(cli, name):
    command = COMMANDS[name]
    assert isinstance(command, Command)
    short = cli(name, "--help").output
    assert len(short.splitlines()) <= SCREEN
    options = {o.opts[0] for o in command.params if o.param_type_name == "option"}
    assert "--help-all" in options
    whole = cli(name, "--help-all")
    assert whole.exit_code == 0
    shown = set(re.findall(r"^│ .*?(--[a-z-]+)", short, re.MULTILINE))
    hidden = options - shown - {"--help-all"}
    assert all(option in whole.output for option in options - {"--help-all"})
    if hidden:
        noun = "option" if len(hidden) == 1 else "options"
        assert f"Show {len(hidden)} more {noun}." in short
    else:
        assert "--help-all" not in short


def test_an_example_is_in_every_help(cli):
    for name in set(COMMANDS) - {"demo", "chat"}:
        assert re.search(rf"quantkit {name} \S|curl", cli(name, "--help").output), name


def test_fields_become_flags():
    names = option_names(COMMANDS)
    message = "`sequence_length` is too small; see `quantkit plan` and `tuning_steps`."
    wanted = "--sequence-length is too small; see `quantkit plan` and --tune."
    assert with_flags(message, names) == wanted


def test_no_library_error_names_a_flag():
    """Flags belong to the command line: messages of the library name fields."""
    import ast
    from pathlib import Path

    import quantkit

    root = Path(quantkit.__file__).parent
    flags = set(option_names(COMMANDS).values()) - {"--help"}
    looked = 0
    for path in sorted(root.rglob("*.py")):
        if path.is_relative_to(root / "cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                looked += 1
                text = ast.unparse(node.exc)
                found = [flag for flag in flags if re.search(rf"{flag}\b", text)]
                # A whole command to run is no reference to an option of this one.
                assert not found or "quantkit " in text or "mlx_lm" in text, (path, text)
    assert looked > 100


NAMED = [
    ("quantize", "-b", "4bpw", "--reserve", "-1GB", "-o", "q"),
    ("quantize", "-b", "4bpw", "--context", "-5", "-o", "q"),
    ("quantize", "-b", "4bpw", "--active-bytes", "", "-o", "q"),
    ("quantize", "-b", "4bpw", "--speed", "60", "-o", "q"),
    ("quantize", "-b", "abc", "-o", "q", "--budget"),
    ("quantize", "-b", "4bpw", "--tiers", "q4", "-o", "q"),
    ("quantize", "-b", "4bpw", "--min-tier", "", "-o", "q"),
    ("quantize", "-b", "4bpw", "--pin", "lm_head=q7", "-o", "q"),
    ("quantize", "-b", "4bpw", "--pin", "nope=q4g64", "-o", "q"),
    ("quantize", "-b", "4bpw", "--tie", "nope", "-o", "q"),
    ("quantize", "-b", "4bpw", "--profile", "/nope", "-o", "q"),
    ("quantize", "-r", "nope", "-o", "q", "--recipe"),
    ("quantize", "-r", "uniform-4", "--shard-size", "abc", "-o", "q"),
    ("quantize", "-r", "uniform-4", "--quantizer", "no", "-o", "q"),
    ("quantize", "-r", "uniform-4", "--quantizer", "gptq", "--quantizer-tokens", "-1", "-o", "q"),
    ("quantize", "-r", "uniform-4", "--quantizer", "gptq", "--calibration", "no.txt", "-o", "q"),
    ("quantize", "-r", "uniform-4", "--dtype", "int8", "-o", "q"),
    ("profile", "--tiers", "q4", "-o", "q"),
    ("profile", "--tokens", "0", "-o", "q"),
    ("profile", "--sequence-length", "1", "-o", "q"),
    ("profile", "--method", "guess", "-o", "q"),
    ("profile", "--draws", "0", "-o", "q"),
    ("profile", "--memory", "abc", "-o", "q"),
    ("plan", "--plan", ""),
    ("plan", "--profile", "q", "--frontier", "--explain", "x"),
]


@pytest.mark.parametrize("words", NAMED, ids=" ".join)
def test_a_refusal_names_its_option(cli, checkpoint, tmp_path, monkeypatch, words):
    """The last option with a bad value, or the long name that stands at the end."""
    monkeypatch.chdir(tmp_path)
    command, *options = words
    bare = options.pop() if options[-1].startswith("--") else None
    flag = bare or [option for option in options if option.startswith("--")][-1]
    result = cli(command, checkpoint, *options)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    assert re.search(rf"{flag}(?![\w-])", result.stderr), result.stderr
    assert "`" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_usage_errors_are_one_line(cli):
    for words in (("--foo",), ("nope",), ("plan", "--nope")):
        result = cli(*words)
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1, result.stderr
