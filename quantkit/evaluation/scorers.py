"""Scorers: whether an answer to an item of a benchmark is right.

Only the final channel counts. An answer without one, one that was cut off, and one on which the
scorer fails are wrong, each with a verdict of its own.
"""

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any

from quantkit.artifacts.scores import (
    NO_ANSWER,
    RIGHT,
    SCORER_ERROR,
    TRUNCATED,
    WRONG,
    Answer,
    Call,
)
from quantkit.errors import InputError
from quantkit.evaluation.benchmarks import LETTERS
from quantkit.evaluation.official import calls_match, follows_instructions
from quantkit.evaluation.sandbox import passes

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_BLOCK = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


def verdict(scorer: str, fields: Mapping[str, Any], answer: Answer) -> str:
    """Return the verdict on an answer. Raises InputError if a checker is not installed."""
    if answer.truncated:
        return TRUNCATED
    if answer.final is None and not answer.calls:
        return NO_ANSWER
    try:
        return RIGHT if SCORERS[scorer](fields, answer) else WRONG
    except InputError:
        raise
    except Exception:  # noqa: BLE001  (the checkers are foreign; a crash is never a pass)
        return SCORER_ERROR


def letter(fields: Mapping[str, Any], answer: Answer) -> bool:
    """Compare the letter of a multiple choice to the number of the right one."""
    return answer.final == LETTERS[int(fields["answer"])]


def number(fields: Mapping[str, Any], answer: Answer) -> bool:
    """Compare the last number of the answer to the one behind `####` in GSM8K's solution."""
    numbers = _NUMBER.findall(answer.final or "")
    right = fields["answer"].rpartition("####")[2]
    return bool(numbers) and _value(numbers[-1]) == _value(right)


def _value(text: str) -> float:
    return float(text.strip().replace(",", "").rstrip("."))


def instructions(fields: Mapping[str, Any], answer: Answer) -> bool:
    """Check all instructions of an IFEval prompt (strict)."""
    return follows_instructions(fields, answer.final or "")


def call(fields: Mapping[str, Any], answer: Answer) -> bool:
    """Compare the one call of a function, or calls written as text, to BFCL's answers."""
    calls = answer.calls or _written_calls(answer.final or "")
    return calls_match(fields, calls)


def _written_calls(text: str) -> list[Call]:
    """Return the calls in a text such as [f(a=1)]; none for a text that is not Python."""
    try:
        body = ast.parse(text.strip().strip("`").strip(), mode="eval").body
        nodes = body.elts if isinstance(body, ast.List) else [body]
        return [
            (
                ast.unparse(node.func),
                {str(word.arg): ast.literal_eval(word.value) for word in node.keywords},
            )
            for node in nodes
            if isinstance(node, ast.Call)
        ]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def program(fields: Mapping[str, Any], answer: Answer) -> bool:
    """Run the function in the answer against HumanEval's tests, in a sandbox."""
    text = answer.final or ""
    blocks = _BLOCK.findall(text)
    code = next((b for b in reversed(blocks) if f"def {fields['entry_point']}" in b), None)
    code = code or (blocks[-1] if blocks else text)
    tests = f"{fields['test']}\ncheck({fields['entry_point']})\n"
    return passes(f"{fields['prompt']}\n{code}\n\n{tests}")


def chain_end(fields: Mapping[str, Any], answer: Answer) -> bool:
    """Compare the last word of 16 letters, but for the query, to the end of the chain."""
    words = re.findall(r"\b[A-Za-z]{16}\b", answer.final or "")
    return [word for word in words if word != fields["query"]][-1:] == [fields["answer"]]


SCORERS: dict[str, Callable[[Mapping[str, Any], Answer], bool]] = {
    "letter": letter,
    "number": number,
    "instructions": instructions,
    "call": call,
    "program": program,
    "chain_end": chain_end,
}
