"""Problems about fractions and whole numbers, mostly in LaTeX; every answer is computed."""
# ruff: noqa: RUF001  (the multiplication sign is meant)

import math
from fractions import Fraction
from random import Random

from maths_notation import Problem, Shape, tex


def fractions(rng: Random) -> Problem:
    """A sum and a product of fractions."""
    a = Fraction(rng.choice([1, 5, 7, 11]), rng.choice([3, 4, 6, 9]))
    b, c = Fraction(rng.choice([1, 3, 5]), 8), Fraction(rng.randint(2, 7), rng.choice([3, 9, 11]))
    common = math.lcm(a.denominator, b.denominator)
    up = [v.numerator * common // v.denominator for v in (a, b)]
    return Problem(
        "Fractions",
        f"Compute $\\left({tex(a)} + {tex(b)}\\right) \\cdot {tex(c)}$ and reduce the result.",
        (
            f"A common denominator of {a.denominator} and {b.denominator} is {common}.",
            f"${tex(a)} + {tex(b)} = \\frac{{{up[0]}}}{{{common}}} + \\frac{{{up[1]}}}{{{common}}} "
            f"= {tex(a + b)}$.",
            f"Multiply numerators and denominators: ${tex(a + b)} \\cdot {tex(c)} = "
            f"{tex((a + b) * c)}$ in lowest terms.",
        ),
        f"${tex((a + b) * c)}$",
    )


def euclid(rng: Random) -> Problem:
    """A greatest common divisor, and it as a combination."""
    g = rng.choice([3, 4, 6, 7, 12, 14, 15])
    a, b = (g * k for k in sorted(rng.sample(range(11, 90), 2), reverse=True))
    steps, (r, s), (u, v), (w, z) = [], (a, b), (1, 0), (0, 1)
    while s:  # always r = a u + b w and s = a v + b z
        q = r // s
        steps.append(f"${r} = {q} \\cdot {s} + {r - q * s}$")
        r, s, u, v, w, z = s, r - q * s, v, u - q * v, z, w - q * z
    return Problem(
        "The Euclidean algorithm",
        f"Find $\\gcd({a}, {b})$, write it as ${a}m + {b}n$ with integers $m, n$, and reduce "
        f"$\\frac{{{b}}}{{{a}}}$.",
        (
            "Divide with remainder again and again:",
            *steps,
            f"The last remainder that is not zero is {r}.",
            f"Working backwards, ${r} = {a} \\cdot ({u}) + {b} \\cdot ({w})$.",
            f"Dividing by {r}: $\\frac{{{b}}}{{{a}}} = {tex(Fraction(b, a))}$.",
        ),
        f"$\\gcd({a}, {b}) = {r}$ with $m = {u}$, $n = {w}$.",
    )


def divisors(rng: Random) -> Problem:
    """A prime factorisation, and the number and sum of the divisors."""
    powers = {2: rng.randint(1, 4), 3: rng.randint(1, 3), rng.choice([5, 7, 11]): 1}
    n = math.prod(p**k for p, k in powers.items())
    product = " \\cdot ".join(f"{p}^{k}" if k > 1 else str(p) for p, k in powers.items())
    count = " \\cdot ".join(f"({k} + 1)" for k in powers.values())
    sums = " \\cdot ".join(str(sum(p**i for i in range(k + 1))) for p, k in powers.items())
    found = [d for d in range(1, n + 1) if n % d == 0]
    return Problem(
        "Divisors",
        f"Write {n} as a product of primes. How many divisors does it have, and what is their sum?",
        (
            f"Dividing out 2, then 3, then what is left: ${n} = {product}$.",
            "A divisor takes each prime with an exponent between 0 and the one above, so there are "
            f"${count} = {len(found)}$ of them.",
            "Their sum is the product of the sums of powers of each prime: "
            f"${sums} = {sum(found)}$.",
        ),
        f"${n} = {product}$; {len(found)} divisors with sum {sum(found)}.",
    )


def power_residue(rng: Random) -> Problem:
    """A large power modulo a small prime."""
    p = rng.choice([7, 11, 13, 17, 19, 23])
    a, n = rng.randrange(2, p), rng.randrange(60, 900)
    r = n % (p - 1)
    return Problem(
        "A large power",
        f"What is the remainder of ${a}^{{{n}}}$ on division by {p}?",
        (
            f"{p} is prime and does not divide {a}, so by Fermat's little theorem "
            f"${a}^{{{p - 1}}} \\equiv 1 \\pmod{{{p}}}$.",
            f"Divide the exponent: ${n} = {n // (p - 1)} \\cdot {p - 1} + {r}$.",
            f"Hence ${a}^{{{n}}} \\equiv {a}^{{{r}}} \\pmod{{{p}}}$.",
            f"${a}^{{{r}}} = {a**r}$, and that leaves the remainder {pow(a, n, p)}.",
        ),
        f"${a}^{{{n}}} \\equiv {pow(a, n, p)} \\pmod{{{p}}}$",
    )


def bases(rng: Random) -> Problem:
    """A number in another base."""
    n, base = rng.randrange(150, 4000), rng.choice([2, 3, 5, 7, 8])
    steps, digits, rest = [], "", n
    while rest:
        steps.append(f"{rest} = {base} × {rest // base} + {rest % base}")
        digits, rest = f"{rest % base}{digits}", rest // base
    return Problem(
        "Another base",
        f"Write the decimal number {n} in base {base}.",
        (
            f"Divide by {base} until nothing is left and collect the remainders:",
            *steps,
            f"Read from the last remainder to the first, the digits are {digits}.",
        ),
        f"{n} is {digits} in base {base}.",
    )


def repeating(rng: Random) -> Problem:
    """A repeating decimal as a fraction."""
    period = rng.choice([12, 18, 27, 36, 45, 54, 63, 72, 135, 216, 351, 405, 486, 648])
    whole = rng.randint(0, 6)
    shift = 10 ** len(str(period))
    value = whole + Fraction(period, shift - 1)
    return Problem(
        "A repeating decimal",
        f"Write $x = {whole}.\\overline{{{period}}}$ as a fraction in lowest terms.",
        (
            f"The period has {len(str(period))} digits, so multiply by ${shift}$: "
            f"${shift}x = {whole * shift + period}.\\overline{{{period}}}$.",
            f"Subtract $x$: ${shift - 1}x = {whole * shift + period - whole}$.",
            f"Divide and reduce: $x = {tex(value)}$.",
            f"Division confirms it: {value.numerator} ÷ {value.denominator} ≈ {float(value):.6f}.",
        ),
        f"$x = {tex(value)}$",
    )


def consecutive(rng: Random) -> Problem:
    """A short proof, for a number that is drawn."""
    n, start = rng.choice([3, 5, 7, 9, 11, 13]), rng.randint(4, 40)
    total = sum(range(start, start + n))
    return Problem(
        "A short proof",
        f"Show that the sum of any {n} consecutive integers is divisible by {n}, and find the "
        f"{n} consecutive integers whose sum is {total}.",
        (
            f"Let $m$ be the middle one of the {n} integers. The others come in pairs $m - k$ and "
            f"$m + k$ for $k = 1, \\dots, {n // 2}$.",
            "Each pair has the sum $2m$, because the $k$ cancels.",
            f"Together with $m$ itself the sum is $m + {n // 2} \\cdot 2m = {n}m$, a multiple of "
            f"{n}. This proves the claim.",
            f"If ${n}m = {total}$, then $m = {total // n}$.",
        ),
        f"The integers run from {start} to {start + n - 1}.",
    )


def remainders(rng: Random) -> Problem:
    """Two congruences at once."""
    p, q = rng.choice([(5, 7), (4, 9), (7, 11), (8, 13), (9, 11), (5, 12)])
    x = rng.randrange(q + 1, p * q)
    a, b = x % p, x % q
    tried = range(b, x + 1, q)
    return Problem(
        "Two remainders",
        f"Which numbers leave the remainder {a} on division by {p} and {b} on division by {q}?",
        (
            f"Numbers with remainder {b} modulo {q}: {', '.join(map(str, tried))}, ...",
            f"Their remainders modulo {p}: {', '.join(str(v % p) for v in tried)}, ...",
            f"The first with remainder {a} is {x}.",
            f"{p} and {q} have no common divisor, so by the Chinese remainder theorem the solution "
            f"is unique modulo ${p} \\cdot {q} = {p * q}$.",
        ),
        f"$x \\equiv {x} \\pmod{{{p * q}}}$",
    )


def induction(rng: Random) -> Problem:
    """A sum formula by induction, then used."""
    n, a = rng.randint(20, 90), rng.choice([3, 5, 7, 9])
    return Problem(
        "Induction",
        f"Prove by induction that ${a} + {2 * a} + \\dots + {a}n = \\frac{{{a}n(n+1)}}{{2}}$, and "
        f"evaluate the sum for $n = {n}$.",
        (
            f"For $n = 1$ both sides are {a}.",
            f"Assume the formula for $n$ and add ${a}(n+1)$ to both sides: "
            f"$\\frac{{{a}n(n+1)}}{{2}} + {a}(n+1) = \\frac{{{a}(n+1)(n+2)}}{{2}}$.",
            "That is the formula for $n + 1$, so it holds for every $n \\ge 1$.",
            f"For $n = {n}$ it gives $\\frac{{{a} \\cdot {n} \\cdot {n + 1}}}{{2}} = "
            f"{sum(range(a, a * n + 1, a))}$.",
        ),
        f"The sum is {sum(range(a, a * n + 1, a))}.",
    )


SHAPES: tuple[Shape, ...] = (
    *(fractions, euclid, divisors, power_residue, bases, repeating, consecutive, remainders),
    induction,
)
