"""Problems in symbols, mostly in LaTeX; the answers are computed, never typed."""

import math
from fractions import Fraction
from random import Random

from maths_notation import Problem, Shape, at, poly, tex


def nonzero(rng: Random, size: int) -> int:
    """A whole number between -size and size, but not 0."""
    return rng.choice([-1, 1]) * rng.randint(1, size)


def linear(rng: Random) -> Problem:
    """An equation with the unknown on both sides."""
    a, c, x, b = rng.randint(4, 9), rng.randint(1, 2), nonzero(rng, 12), nonzero(rng, 15)
    d = (a - c) * x + b
    return Problem(
        "A linear equation",
        f"Solve ${poly([b, a])} = {poly([d, c])}$.",
        (
            f"Subtract ${poly([0, c])}$ from both sides: ${poly([b, a - c])} = {d}$.",
            f"Move the constant: ${poly([0, a - c])} = {d - b}$.",
            f"Divide by {a - c}: $x = {x}$.",
            f"Check: both sides are ${at([b, a], x)}$ for $x = {x}$.",
        ),
        f"$x = {x}$",
    )


def system(rng: Random) -> Problem:
    """Two linear equations by substitution."""
    x, y = nonzero(rng, 9), nonzero(rng, 9)
    a, b, c = rng.randint(2, 6), rng.randint(2, 6), rng.randint(2, 6)
    p, q = a * x + b * y, c * x - y
    return Problem(
        "Two equations",
        f"Solve the system\n$$\\begin{{cases}} {a}x + {b}y = {p} \\\\ {c}x - y = {q} "
        "\\end{cases}$$",
        (
            f"From the second equation $y = {poly([-q, c])}$.",
            f"Put it into the first: ${a}x + {b}({poly([-q, c])}) = {p}$.",
            f"Then ${a + b * c}x = {p + b * q}$, so $x = {x}$.",
            f"Hence $y = {c} \\cdot ({x}) - ({q}) = {y}$.",
            f"The first equation confirms it: ${a} \\cdot ({x}) + {b} \\cdot ({y}) = {p}$.",
        ),
        f"$(x, y) = ({x}, {y})$",
    )


def quadratic(rng: Random) -> Problem:
    """A quadratic with whole roots, by factoring."""
    r, s = sorted(rng.sample([k for k in range(-9, 10) if k], 2))
    f = poly([r * s, -r - s, 1])
    return Problem(
        "Factoring a quadratic",
        f"Find all solutions of ${f} = 0$ by factoring.",
        (
            f"We look for two numbers with product ${r * s}$ and sum ${-r - s}$: "
            f"${-r}$ and ${-s}$.",
            f"So ${f} = ({poly([-r, 1])})({poly([-s, 1])})$.",
            "A product is zero exactly when one of its factors is.",
            f"This gives $x = {r}$ or $x = {s}$.",
        ),
        f"$x \\in \\{{{r}, {s}\\}}$",
    )


def completing(rng: Random) -> Problem:
    """A quadratic with irrational roots, by completing the square."""
    p, m = nonzero(rng, 6), rng.choice([2, 3, 5, 6, 7, 10, 11, 13])
    f, inner = poly([p * p - m, 2 * p, 1]), poly([p, 1])
    return Problem(
        "Completing the square",
        f"Solve ${f} = 0$ by completing the square, and state the vertex of the parabola.",
        (
            f"Half of the coefficient of $x$ is ${p}$, and $({p})^2 = {p * p}$.",
            f"So ${f} = ({inner})^2 - {m}$.",
            f"The equation becomes $({inner})^2 = {m}$, hence ${inner} = \\pm\\sqrt{{{m}}}$.",
            f"Therefore $x = {-p} \\pm \\sqrt{{{m}}}$, that is "
            f"$x \\approx {-p + math.sqrt(m):.3f}$ or $x \\approx {-p - math.sqrt(m):.3f}$.",
            f"The square vanishes at $x = {-p}$, where the value is ${-m}$.",
        ),
        f"$x = {-p} \\pm \\sqrt{{{m}}}$; the vertex is $({-p}, {-m})$.",
    )


def derivative(rng: Random) -> Problem:
    """The tangent of a polynomial at a point."""
    f = [nonzero(rng, 6), nonzero(rng, 5), nonzero(rng, 4), rng.choice([0, 1, 2])]
    x = rng.choice([-2, -1, 1, 2, 3])
    df = [k * c for k, c in enumerate(f)][1:]
    slope, value = at(df, x), at(f, x)
    tangent = poly([value - slope * x, slope])
    return Problem(
        "A tangent",
        f"Let $f(x) = {poly(f)}$. Find $f'(x)$ and the tangent to the graph at $x = {x}$.",
        (
            f"By the power rule, term by term, $f'(x) = {poly(df)}$.",
            f"The slope at $x = {x}$ is $f'({x}) = {slope}$.",
            f"The point of contact is $({x}, f({x})) = ({x}, {value})$.",
            f"The tangent is $y = {slope}\\,(x - ({x})) + ({value})$, which is $y = {tangent}$.",
        ),
        f"$f'(x) = {poly(df)}$; tangent $y = {tangent}$.",
    )


def extrema(rng: Random) -> Problem:
    """Local extrema of a cubic with whole stationary points."""
    r, s = sorted(rng.sample(range(-5, 6, 2), 2))
    f = [rng.randint(-5, 9), 6 * r * s, -3 * (r + s), 2]  # so that f' = 6 (x - r)(x - s)
    df = [k * c for k, c in enumerate(f)][1:]
    ddf = [k * c for k, c in enumerate(df)][1:]
    return Problem(
        "Local extrema",
        f"Find the local maximum and minimum of $f(x) = {poly(f)}$.",
        (
            f"$f'(x) = {poly(df)} = 6({poly([-r, 1])})({poly([-s, 1])})$.",
            f"So $f'(x) = 0$ at $x = {r}$ and $x = {s}$.",
            f"$f''(x) = {poly(ddf)}$, with $f''({r}) = {at(ddf, r)} < 0$ and "
            f"$f''({s}) = {at(ddf, s)} > 0$.",
            f"Thus there is a maximum at $x = {r}$ with $f({r}) = {at(f, r)}$, and a minimum at "
            f"$x = {s}$ with $f({s}) = {at(f, s)}$.",
        ),
        f"Maximum $({r}, {at(f, r)})$, minimum $({s}, {at(f, s)})$.",
    )


def integral(rng: Random) -> Problem:
    """A definite integral of a quadratic."""
    f = [nonzero(rng, 6), nonzero(rng, 6), rng.choice([1, 2, 3, 4, 6])]
    whole = [Fraction(0), *(Fraction(c, k + 1) for k, c in enumerate(f))]
    a, b = sorted(rng.sample(range(-2, 5), 2))
    value = tex(at(whole, b) - at(whole, a))
    return Problem(
        "A definite integral",
        f"Evaluate\n$$\\int_{{{a}}}^{{{b}}} \\left({poly(f)}\\right)\\,dx.$$",
        (
            f"An antiderivative is $F(x) = {poly(whole)}$.",
            f"$F({b}) = {tex(at(whole, b))}$ and $F({a}) = {tex(at(whole, a))}$.",
            f"By the fundamental theorem of calculus the integral is $F({b}) - F({a}) = {value}$.",
        ),
        f"${value}$",
    )


def geometric(rng: Random) -> Problem:
    """A finite and an infinite geometric series."""
    first, q, n = rng.randint(2, 9), Fraction(1, rng.choice([2, 3, 4, 5])), rng.randint(4, 6)
    part, whole = first * (1 - q**n) / (1 - q), first / (1 - q)
    return Problem(
        "A geometric series",
        f"A geometric series starts with {first} and each term is ${tex(q)}$ of the one before. "
        f"Find the sum of the first {n} terms and of the infinite series.",
        (
            f"The terms are $a_k = {first} \\cdot \\left({tex(q)}\\right)^{{k}}$ for "
            "$k = 0, 1, 2, \\dots$",
            f"The finite sum is $S_{{{n}}} = {first} \\cdot \\frac{{1 - q^{{{n}}}}}{{1 - q}} = "
            f"{tex(part)} \\approx {float(part):.4f}$.",
            f"Since $|q| < 1$, $q^n$ tends to 0 and $S = \\frac{{{first}}}{{1 - q}} = "
            f"{tex(whole)}$.",
        ),
        f"$S_{{{n}}} = {tex(part)}$ and $S = {tex(whole)}$.",
    )


def logarithm(rng: Random) -> Problem:
    """An exponential equation with a whole solution."""
    base, k, factor = rng.choice([2, 3, 5]), rng.randint(3, 6), rng.randint(2, 9)
    a, x = rng.choice([2, 3]), rng.randint(2, 7)
    b = k - a * x
    power = poly([b, a])
    return Problem(
        "An exponential equation",
        f"Solve ${factor} \\cdot {base}^{{{power}}} = {factor * base**k}$.",
        (
            f"Divide by {factor}: ${base}^{{{power}}} = {base**k}$.",
            f"Since ${base**k} = {base}^{{{k}}}$, taking $\\log_{{{base}}}$ on both sides gives "
            f"${power} = {k}$.",
            f"So ${poly([0, a])} = {k - b}$ and $x = {x}$.",
        ),
        f"$x = {x}$",
    )


def vectors(rng: Random) -> Problem:
    """A dot product, and a vector made perpendicular."""
    u, v = [[nonzero(rng, 6) for _ in range(3)] for _ in range(2)]
    dot = sum(a * b for a, b in zip(u, v, strict=True))
    square = sum(a * a for a in u)
    t = tex(Fraction(dot, square))
    products = " + ".join(f"({a})({b})" for a, b in zip(u, v, strict=True))
    return Problem(
        "Vectors",
        f"Let $u = ({u[0]}, {u[1]}, {u[2]})$ and $v = ({v[0]}, {v[1]}, {v[2]})$. Find $u \\cdot v$ "
        "and the number $t$ for which $v - t u$ is perpendicular to $u$.",
        (
            f"$u \\cdot v = {products} = {dot}$.",
            f"$|u|^2 = {u[0] ** 2} + {u[1] ** 2} + {u[2] ** 2} = {square}$.",
            "Perpendicular means $u \\cdot (v - t u) = u \\cdot v - t\\,|u|^2 = 0$.",
            f"So $t = \\frac{{u \\cdot v}}{{|u|^2}} = {t}$.",
        ),
        f"$u \\cdot v = {dot}$ and $t = {t}$.",
    )


def matrix(rng: Random) -> Problem:
    """The inverse of a 2 x 2 matrix, used to solve a system."""
    a, b, c = (nonzero(rng, 6) for _ in range(3))
    d = rng.choice([k for k in range(-6, 7) if k and a * k != b * c])
    det = a * d - b * c
    x, y = nonzero(rng, 5), nonzero(rng, 5)
    p, q = a * x + b * y, c * x + d * y
    return Problem(
        "An inverse matrix",
        f"Find the inverse of $A = \\begin{{pmatrix}} {a} & {b} \\\\ {c} & {d} \\end{{pmatrix}}$ "
        "and use it to solve $A \\mathbf{x} = "
        f"\\begin{{pmatrix}} {p} \\\\ {q} \\end{{pmatrix}}$.",
        (
            f"$\\det A = ({a})({d}) - ({b})({c}) = {det}$, which is not zero.",
            f"$A^{{-1}} = {tex(Fraction(1, det))} \\begin{{pmatrix}} {d} & {-b} \\\\ {-c} & {a} "
            "\\end{pmatrix}$.",
            "The first component of $\\mathbf{x}$ is "
            f"$\\frac{{({d})({p}) + ({-b})({q})}}{{{det}}} = {x}$.",
            f"The second is $\\frac{{({-c})({p}) + ({a})({q})}}{{{det}}} = {y}$.",
        ),
        f"$\\mathbf{{x}} = \\begin{{pmatrix}} {x} \\\\ {y} \\end{{pmatrix}}$",
    )


def inequality(rng: Random) -> Problem:
    """A linear inequality whose sign turns."""
    a, b, bound = -rng.randint(2, 7), nonzero(rng, 12), nonzero(rng, 8)
    c = a * bound + b
    return Problem(
        "An inequality",
        f"For which real $x$ is ${poly([b, a])} \\le {c}$?",
        (
            f"Subtract ${b}$ on both sides: ${poly([0, a])} \\le {c - b}$.",
            f"Divide by ${a}$. Dividing by a negative number turns the sign around: "
            f"$x \\ge {bound}$.",
            f"Try $x = {bound + 1}$: ${poly([b, a])}$ becomes ${at([b, a], bound + 1)}$, which is "
            f"indeed at most ${c}$. For $x = {bound - 1}$ it is ${at([b, a], bound - 1)}$, which "
            "is too large.",
        ),
        f"Exactly for $x \\ge {bound}$, the interval $[{bound}, \\infty)$.",
    )


def spread(rng: Random) -> Problem:
    """Mean, median and variance of a few numbers."""
    n = rng.choice([5, 7])
    data = [rng.randint(2, 20) for _ in range(n)]
    mean, squares = Fraction(sum(data), n), Fraction(sum(v * v for v in data), n)
    variance = sum((v - mean) ** 2 for v in data) / n
    return Problem(
        "Mean, median, variance",
        f"For the data {', '.join(map(str, data))} compute the mean, the median and the "
        "population variance.",
        (
            f"The sum of the {n} numbers is {sum(data)}, so the mean is {mean}"
            + ("." if mean.denominator == 1 else f", about {float(mean):.3f}."),
            f"In order the data are {', '.join(map(str, sorted(data)))}; the middle one of {n} is "
            f"{sorted(data)[n // 2]}.",
            f"The mean of the squares is {squares}.",
            f"The variance is the mean of the squares less the square of the mean: {variance}, "
            f"about {float(variance):.3f}. The standard deviation is about "
            f"{math.sqrt(variance):.3f}.",
        ),
        f"Mean {mean}, median {sorted(data)[n // 2]}, variance {variance}.",
    )


def line(rng: Random) -> Problem:
    """The line through two points, where it meets the axis, and a midpoint."""
    x, y, a, b = nonzero(rng, 6), nonzero(rng, 6), rng.randint(1, 7), nonzero(rng, 8)
    slope = Fraction(b, a)
    shift = y - slope * x
    f, zero = poly([shift, slope]), tex(-shift / slope)
    return Problem(
        "A line",
        f"Find the line through $P = ({x}, {y})$ and $Q = ({x + a}, {y + b})$, its intersection "
        "with the $x$-axis, and the midpoint of $PQ$.",
        (
            f"The slope is $\\frac{{{y + b} - ({y})}}{{{x + a} - ({x})}} = {tex(slope)}$.",
            f"From $P$: ${y} = {tex(slope)} \\cdot ({x}) + c$, so $c = {tex(shift)}$.",
            f"The line is $y = {f}$; it is zero at $x = {zero}$.",
            f"The midpoint is $\\left({tex(Fraction(2 * x + a, 2))}, {tex(Fraction(2 * y + b, 2))}"
            "\\right)$.",
        ),
        f"$y = {f}$, crossing the axis at $x = {zero}$.",
    )


SHAPES: tuple[Shape, ...] = (
    *(linear, system, quadratic, completing),
    *(derivative, extrema, integral, geometric, logarithm, vectors, matrix, inequality, spread),
    line,
)
