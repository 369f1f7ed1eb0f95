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
    options = [o.opts[0] for o in command.params if o.param_type_name == "option"]
    if "--help-all" not in options:
        assert all(option in short for option in options)
        return
    whole = cli(name, "--help-all")
    assert whole.exit_code == 0
    assert all(option in whole.output for option in options)
    shown = set(re.findall(r"^│ .*?(--[a-z-]+)", short, re.MULTILINE))
    hidden = set(options) - shown
    assert f"Show {len(hidden)} more options" in short
    assert "--help-all" in short


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
