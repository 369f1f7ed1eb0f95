"""The docs quote the messages of the code, and name every command and option."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REFUSED = (ROOT / "docs" / "sources.md").read_text().partition("## Refusals")[2]
ROWS = [line.split("|") for line in REFUSED.splitlines() if line.startswith("|")][2:]
MESSAGES = [message for row in ROWS for message in re.findall(r"`([^`]+)`", row[2])]


@pytest.fixture(scope="module")
def spoken():
    """Every piece of text in the code, those of one expression joined."""
    found = []
    for path in (ROOT / "quantkit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (getattr(part, "value", "\0") for part in node.values)
                found.append("".join(part if isinstance(part, str) else "\0" for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_refusals_are_listed():
    assert len(MESSAGES) >= len(ROWS) > 15


@pytest.mark.parametrize("message", MESSAGES)
def test_a_documented_refusal_is_what_is_said(spoken, message):
    assert message in spoken


def test_every_command_is_in_the_readme():
    from quantkit.cli.main import COMMANDS, app

    assert len(app.registered_commands) > len(COMMANDS)
    text = (ROOT / "README.md").read_text()
    for command in app.registered_commands:
        assert f"quantkit {command.callback.__name__}" in text, command.callback.__name__


def test_options_in_the_docs_exist():
    import typer

    from quantkit.cli.expand import option_names
    from quantkit.cli.main import app

    commands = typer.main.get_command(app).commands
    known = {
        opt for c in commands.values() for p in c.params for opt in (*p.opts, *p.secondary_opts)
    }
    foreign = {
        "--help",
        "--group-size",
        "--bits",
        "--oss",
        "--local-provider",
        "--hosts",
        "--dequantize",
        "--model",
        "--no-deps",
    }
    looked = 0
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for line in path.read_text().splitlines():
            if any(tool in line for tool in ("mlx_lm.", "optiq ", "auto-round ", "pip ")):
                continue
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line):
                assert option in known | foreign, (path.name, option)
                looked += 1
    assert looked > 50
    assert set(option_names(commands).values()) <= known
