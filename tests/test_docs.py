"""What the docs quote is what the code says."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REFUSED = (ROOT / "docs" / "sources.md").read_text().partition("## What is refused")[2]
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
