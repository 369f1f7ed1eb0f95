"""Count the habits that make code hard to read, and fail where there are more than allowed.

    python .ci/english.py            the counts, and those above their level
    python .ci/english.py --list     every place that was counted, too

Prose is the docstrings and comments of the package, and its string literals of three words or
more (help texts and errors). Lower a level when the count falls; never raise one.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VAGUE = {"found", "part", "known", "own", "made", "held", "rest"}
ARRAYS = ("mx.array", "np.ndarray")
SHAPE = re.compile(r"\([^()]*,[^()]*\)|\b(shape|scalar|per (row|token|sequence|layer))\b|\(\w+\)")
# Habit -> (the most that is allowed, its unit)
LEVELS = {
    "what": (0.4, "per 1,000 words"),
    "Of": (0, "per 1,000 words"),
    "no noun": (0.1, "per 1,000 words"),
    "vague names": (0, "bindings"),
    "not imperative": (0, "public docstrings"),
    "long functions": (8, "above 40 lines"),
    "many parameters": (0, "functions with more than six"),
    "no shapes": (0, "public functions on arrays"),
}
HABITS = {
    "what": re.compile(r"\b(what|whatever|whoever)\b", re.IGNORECASE),
    "Of": re.compile(r"(?:^|[.:;!?]\s+|\n\s*)Of\b"),
    "no noun": re.compile(
        r"\b(is|are|was|were|has|have|holds?|gives?|there (is|are)) (?-i:none)\b"
        r"|\bno such\b(?! (file|folder))|\ball else\b|\bthose that\b|\bthat of\b(?! the\b)",
        re.IGNORECASE,
    ),
}
Place = tuple[Path, int, str]


def prose(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every docstring, comment and message of a file."""
    text = path.read_text()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("#: ")
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            words = "".join(
                str(v.value) if isinstance(v, ast.Constant) else "X" for v in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = node.value
        else:
            continue
        if len(words.split()) > 2:
            yield node.lineno, words


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Yield every function of a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Yield the public functions and methods of a file, properties aside."""
    scopes = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
    for scope in scopes:
        for node in scope.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                decorators = {ast.unparse(one).rpartition(".")[2] for one in node.decorator_list}
                if not decorators & {"property", "cached_property", "setter"}:
                    yield node


def bindings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of everything that is bound: variables, parameters, fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


def parameters(function: ast.FunctionDef) -> int:
    """Return how many parameters a function takes, self aside."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return sum(one.arg not in ("self", "cls") for one in every)


def length(function: ast.FunctionDef) -> int:
    """Return the lines of a function, signature and docstring included."""
    return (function.end_lineno or 0) - function.lineno + 1


def imperative(docstring: str) -> bool:
    """Return whether the first word looks like a verb in the imperative."""
    word = re.split(r"\W", docstring, maxsplit=1)[0]
    return bool(word) and word[0].isupper() and not word.endswith("s") and word not in NOT_VERBS


NOT_VERBS = {
    *("The", "A", "An", "All", "Every", "Each", "One", "Some", "How", "Whether", "Which", "By"),
    *("What", "Where", "Why", "When", "It", "In", "For", "From", "With", "Of", "Not", "No"),
    *("There", "This", "That", "Those", "These", "Same", "Rows", "Half", "Its", "Names"),
}


def on_arrays(function: ast.FunctionDef) -> bool:
    """Return whether a function takes or gives arrays."""
    every = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    notes = [one.annotation for one in every] + [function.returns]
    return any(array in ast.unparse(note) for note in notes if note for array in ARRAYS)


def count(paths: list[Path]) -> tuple[dict[str, list[Place]], int]:
    """Return the places of every habit, and the number of words of prose."""
    places: dict[str, list[Place]] = {habit: [] for habit in LEVELS}
    words = 0
    for path in paths:
        tree = ast.parse(path.read_text())
        for line, text in prose(path, tree):
            words += len(text.split())
            for habit, pattern in HABITS.items():
                for match in pattern.finditer(text):
                    where = line + text[: match.start()].count("\n")
                    around = text[max(0, match.start() - 30) : match.end() + 40]
                    places[habit].append((path, where, " ".join(around.split())))
        for line, name in bindings(tree):
            if name in VAGUE:
                places["vague names"].append((path, line, name))
        for function in functions(tree):
            place = (path, function.lineno, function.name)
            if length(function) > 40:
                places["long functions"].append((*place[:2], f"{place[2]} {length(function)}"))
            if parameters(function) > 6:
                places["many parameters"].append(place)
        for function in public_functions(tree):
            place = (path, function.lineno, function.name)
            docstring = ast.get_docstring(function) or ""
            if docstring and not imperative(docstring):
                places["not imperative"].append((*place[:2], docstring.splitlines()[0]))
            if on_arrays(function) and not SHAPE.search(docstring):
                places["no shapes"].append(place)
    return places, words


def main() -> int:
    """Print the counts; return 1 where one is above its level."""
    paths = sorted((ROOT / "quantkit").rglob("*.py"))
    places, words = count(paths)
    status = 0
    for habit, (level, unit) in LEVELS.items():
        number = float(len(places[habit]))
        if unit == "per 1,000 words":
            number = round(1000 * number / words, 2)
        above = number > level
        status |= above
        print(f"{habit:16} {number:7g} {unit}, allowed {level:g}{'  TOO MANY' if above else ''}")
        if above or "--list" in sys.argv:
            for path, line, text in places[habit]:
                if "--list" in sys.argv:
                    print(f"    {path.relative_to(ROOT)}:{line}: {text}")
    return status


if __name__ == "__main__":
    sys.exit(main())
