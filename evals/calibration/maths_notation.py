"""What every maths problem is made of, and how numbers are written in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import TypeAlias


@dataclass(frozen=True)
class Problem:
    """A question, the steps that solve it, and the answer as a sentence."""

    title: str
    question: str
    steps: tuple[str, ...]
    answer: str


Shape: TypeAlias = Callable[[Random], Problem]


def plural(count: int, thing: str) -> str:
    """`count` things."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def money(cents: int | Fraction, exact: bool = True) -> str:
    """Cents as dollars; an amount that is no whole number of cents only where not `exact`."""
    if exact and Fraction(cents).denominator != 1:
        raise ValueError(f"{cents} cents is no whole number of cents")
    whole = round(cents)
    return f"${whole // 100:,}" if whole % 100 == 0 else f"${whole // 100:,}.{whole % 100:02}"


def number(value: Fraction) -> str:
    """A whole number, a short decimal where that is exact, else a fraction."""
    if value.denominator == 1:
        return str(value.numerator)
    if 10**6 % value.denominator == 0:
        return f"{float(value):.6f}".rstrip("0")
    return str(value)


def mixed(value: Fraction) -> str:
    """A fraction as a mixed number: 7/3 is 2 1/3."""
    whole, rest = divmod(abs(value.numerator), value.denominator)
    sign = "-" if value < 0 else ""
    if rest == 0:
        return f"{sign}{whole}"
    part = f"{rest}/{value.denominator}"
    return f"{sign}{whole} {part}" if whole else f"{sign}{part}"


def tex(value: Fraction | int) -> str:
    """A number in LaTeX."""
    value = Fraction(value)
    if value.denominator == 1:
        return str(value.numerator)
    sign = "-" if value < 0 else ""
    return rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def poly(coefficients: Sequence[Fraction | int], x: str = "x") -> str:
    """A polynomial in LaTeX, from the coefficients of x^0, x^1, ..."""
    terms = ""
    for power in reversed(range(len(coefficients))):
        c = Fraction(coefficients[power])
        if c == 0:
            continue
        letter = "" if power == 0 else x if power == 1 else f"{x}^{{{power}}}"
        size = "" if abs(c) == 1 and power else tex(abs(c))
        sign = ("-" if c < 0 else "") if not terms else " - " if c < 0 else " + "
        terms += f"{sign}{size}{letter}"
    return terms or "0"


def at(coefficients: Sequence[Fraction | int], x: Fraction | int) -> Fraction:
    """A polynomial's value."""
    return sum((Fraction(c) * Fraction(x) ** k for k, c in enumerate(coefficients)), Fraction(0))
