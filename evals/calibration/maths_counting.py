"""Problems about counting and chance; every answer is computed."""
# ruff: noqa: RUF001  (the multiplication sign is meant)

import math
from fractions import Fraction
from random import Random

from maths_notation import Problem, Shape, mixed, plural

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
WORDS = ("BANANA", "LEVEL", "PEPPER", "COFFEE", "SUCCESS", "BALLOON", "LETTER", "TATTOO", "KAYAK")


def weekday(rng: Random) -> Problem:
    """The day of the week after many days."""
    start, days = rng.randrange(7), rng.randint(60, 900)
    end = (start + days) % 7
    return Problem(
        "Day of the week",
        f"Today is {DAYS[start]}. What day of the week will it be in {days} days?",
        (
            "The days of the week repeat every 7 days, so only the remainder counts.",
            f"{days} = 7 × {days // 7} + {days % 7}.",
            f"Going {plural(days % 7, 'day')} on from {DAYS[start]} leads to {DAYS[end]}.",
        ),
        f"It will be {DAYS[end]}.",
    )


def theatre(rng: Random) -> Problem:
    """Seats in rows: an arithmetic series."""
    first, step, rows = rng.randint(12, 24), rng.randint(2, 4), rng.randrange(10, 31)
    last = first + step * (rows - 1)
    total = rows * (first + last) // 2
    return Problem(
        "Seats in a theatre",
        f"The first row of a theatre has {first} seats and each row has {step} more than the row "
        f"before it. There are {rows} rows. How many seats are there in all?",
        (
            f"The last row has {first} + {rows - 1} × {step} = {last} seats.",
            "Pairing the first row with the last, the second with the last but one, and so on, "
            f"always gives {first} + {last} = {first + last}.",
            f"The sum is {rows} × {first + last} ÷ 2 = {total}.",
        ),
        f"The theatre has {total} seats.",
    )


def doubling(rng: Random) -> Problem:
    """Growth by doubling until a bound is passed."""
    start, minutes = rng.choice([50, 80, 120, 300]), rng.choice([15, 20, 30, 40])
    goal = rng.choice([10000, 50000, 100000])
    steps = next(k for k in range(40) if start * 2**k > goal)
    return Problem(
        "Doubling",
        f"A culture starts with {start} bacteria and doubles every {minutes} minutes. After how "
        f"many doublings are there more than {goal}, and how long does that take?",
        (
            f"After k doublings there are {start} · 2^k bacteria.",
            f"We need 2^k > {goal} ÷ {start}, which is about {goal / start:.1f}.",
            f"2^{steps - 1} = {2 ** (steps - 1)} is too small, 2^{steps} = {2**steps} is enough, "
            f"so k = {steps}.",
            f"That takes {steps} × {minutes} = {steps * minutes} minutes, and there are then "
            f"{start * 2**steps} bacteria.",
        ),
        f"After {steps} doublings, that is {steps * minutes} minutes.",
    )


def marbles(rng: Random) -> Problem:
    """Two draws without replacement."""
    red, blue = rng.randint(3, 9), rng.randint(3, 9)
    n = red + blue
    reds = Fraction(red, n) * Fraction(red - 1, n - 1)
    blues = Fraction(blue, n) * Fraction(blue - 1, n - 1)
    return Problem(
        "Two marbles",
        f"A bag holds {red} red and {blue} blue marbles. Two are drawn without putting the first "
        "one back. What is the probability that they have the same colour?",
        (
            f"Both red: {red}/{n} × {red - 1}/{n - 1} = {reds}.",
            f"Both blue: {blue}/{n} × {blue - 1}/{n - 1} = {blues}.",
            "The two cases exclude each other, so their probabilities add up.",
            f"{reds} + {blues} = {reds + blues}, about {float(reds + blues):.3f}.",
        ),
        f"The probability is {reds + blues}.",
    )


def dice(rng: Random) -> Problem:
    """The sum of two dice, by listing."""
    goal = rng.randint(4, 10)
    pairs = [(a, goal - a) for a in range(1, 7) if 1 <= goal - a <= 6]
    chance = Fraction(len(pairs), 36)
    miss = (1 - chance) ** 2
    return Problem(
        "Two dice",
        f"Two fair dice are thrown. What is the probability that the sum is {goal}? What is the "
        "probability of seeing it at least once in two throws of the pair?",
        (
            "There are 6 × 6 = 36 equally likely outcomes.",
            f"The sum is {goal} for {', '.join(f'({a}, {b})' for a, b in pairs)}: {len(pairs)} "
            f"outcomes out of 36, so the probability is {chance}.",
            f"Missing it twice has probability ({1 - chance})² = {miss}.",
            f"Hence at least once: 1 - {miss} = {1 - miss}.",
        ),
        f"{chance} for one throw, {1 - miss} for two.",
    )


def wheel(rng: Random) -> Problem:
    """The expected gain of a game."""
    n, prize, small, fee = rng.choice([8, 10, 12]), rng.randint(8, 20), rng.randint(2, 5), 2
    paid = Fraction(prize + 2 * small, n)
    gain = paid - fee
    kind = "loses" if gain < 0 else "gains"
    verdict = f"The player {kind} {mixed(abs(gain))} points a turn."
    return Problem(
        "A fair game?",
        f"A wheel has {n} equal sectors. One pays {prize} points, two pay {small} points each and "
        f"the others pay nothing. A turn costs {fee} points. What does a player gain or lose per "
        "turn in the long run?",
        (
            f"The expected payment is {prize} · 1/{n} + {small} · 2/{n} = {prize + 2 * small}/{n} "
            f"points, that is {mixed(paid)}.",
            f"The fee of {fee} points is paid every time.",
            f"The expected gain is {mixed(paid)} - {fee} = {mixed(gain)} points.",
        ),
        verdict if gain else "The game is fair.",
    )


def committee(rng: Random) -> Problem:
    """Choosing a committee with a condition."""
    women, men, size = rng.randint(4, 8), rng.randint(4, 8), rng.choice([3, 4])
    every, none = math.comb(women + men, size), math.comb(men, size)
    return Problem(
        "A committee",
        f"A committee of {size} is chosen from {women} women and {men} men. In how many ways can "
        "this be done if there must be at least one woman?",
        (
            f"Without the condition there are C({women + men}, {size}) = {every} committees.",
            f"Those without any woman are chosen from the {men} men: C({men}, {size}) = {none}.",
            f"All the others have at least one woman: {every} - {none} = {every - none}.",
        ),
        f"There are {every - none} ways.",
    )


def letters(rng: Random) -> Problem:
    """Arrangements of a word with repeated letters."""
    word = rng.choice(WORDS)
    repeats = {c: word.count(c) for c in sorted(set(word)) if word.count(c) > 1}
    below = math.prod(math.factorial(k) for k in repeats.values())
    total = math.factorial(len(word))
    factors = " · ".join(f"{k}!" for k in repeats.values())
    counts = ", ".join(f"{c} occurs {k} times" for c, k in repeats.items())
    return Problem(
        "Arranging letters",
        f"How many different arrangements do the letters of the word {word} have?",
        (
            f"The word has {len(word)} letters; if all differed there would be {len(word)}! = "
            f"{total} arrangements.",
            f"Here {counts}. Swapping equal letters changes nothing, so every arrangement was "
            f"counted {factors} = {below} times.",
            f"{total} ÷ {below} = {total // below}.",
        ),
        f"There are {total // below} arrangements.",
    )


SHAPES: tuple[Shape, ...] = (
    *(theatre, doubling, weekday, marbles, dice, wheel, committee, letters),
)
