"""Maths documents: problems drawn from the four collections, in several layouts."""

from collections.abc import Callable, Iterator
from random import Random

import maths_counting
import maths_numbers
import maths_symbols
import maths_words
from maths_notation import Problem

SHORTEST, LONGEST = 300, 2500
IN_WORDS = (*maths_words.SHAPES, *maths_counting.SHAPES)
IN_SYMBOLS = (*maths_symbols.SHAPES, *maths_numbers.SHAPES)


def documents(rng: Random) -> Iterator[tuple[str, str]]:
    """Endless documents and the kinds of problems in them; every kind in its turn."""
    shapes = [*IN_WORDS, *IN_SYMBOLS]
    seen: set[str] = set()
    waiting: list[Problem] = []
    layouts = LAYOUTS
    while True:
        rng.shuffle(shapes)
        for shape in shapes:
            problem = shape(rng)
            if problem.question in seen:
                continue
            seen.add(problem.question)
            waiting.append(problem)
            if shape in IN_WORDS:
                layouts = LAYOUTS[:-1]  # their dollars are money, which LaTeX would take for maths
            if len(waiting) < rng.choice([1, 1, 1, 2, 3]):
                continue
            text = "\n\n".join(map(rng.choice(layouts), waiting))
            if SHORTEST <= len(text) <= LONGEST:
                yield text, ", ".join(p.title.lower() for p in waiting)
            if len(text) >= SHORTEST:
                waiting, layouts = [], LAYOUTS


def textbook(problem: Problem) -> str:
    """A heading, the question, a line for each step."""
    steps = "\n".join(problem.steps)
    return f"## {problem.title}\n\n{problem.question}\n\n{steps}\n\n{problem.answer}"


def exercise(problem: Problem) -> str:
    """Numbered steps under bold words."""
    steps = "\n".join(f"{n}. {step}" for n, step in enumerate(problem.steps, 1))
    opening = f"**Problem.** {problem.question}"
    return f"{opening}\n\n**Solution.**\n{steps}\n\n**Answer.** {problem.answer}"


def dialogue(problem: Problem) -> str:
    """Question and answer, the reasoning in one paragraph."""
    return f"Q: {problem.question}\n\nA: {' '.join(problem.steps)}\n\nAnswer: {problem.answer}"


def careful(problem: Problem) -> str:
    """Step by step, aloud."""
    steps = "\n\n".join(f"Step {n}: {step}" for n, step in enumerate(problem.steps, 1))
    opening = f"{problem.question}\n\nLet us solve this step by step."
    return f"{opening}\n\n{steps}\n\nFinal answer: {problem.answer}"


def listed(problem: Problem) -> str:
    """A worked example with bullets."""
    steps = "\n".join(f"- {step}" for step in problem.steps)
    opening = f"Example ({problem.title.lower()})"
    return f"{opening}\n\n{problem.question}\n\n{steps}\n\nResult: {problem.answer}"


def latex(problem: Problem) -> str:
    """The source of a LaTeX exercise."""
    steps = "\n".join(f"  \\item {step}" for step in problem.steps)
    return (
        f"\\begin{{exercise}}[{problem.title}]\n{problem.question}\n\\end{{exercise}}\n\n"
        f"\\begin{{solution}}\n\\begin{{enumerate}}\n{steps}\n\\end{{enumerate}}\n"
        f"{problem.answer}\n\\end{{solution}}"
    )


LAYOUTS: tuple[Callable[[Problem], str], ...]
LAYOUTS = (textbook, exercise, dialogue, careful, listed, latex)
