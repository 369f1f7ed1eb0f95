"""Word problems whose numbers are drawn and whose every answer is computed."""
# ruff: noqa: RUF001  (the multiplication sign is meant)

import math
from fractions import Fraction
from random import Random

from maths_notation import Problem, Shape, mixed, money, number, plural

NAMES = ("Amina", "Chloe", "Dmitri", "Elena", "Farid", "Hiro", "Ines", "Jonas", "Kavya", "Omar")


def shopping(rng: Random) -> Problem:
    """Change from a note after buying two kinds of things."""
    name = rng.choice(NAMES)
    first, second = rng.sample(["notebook", "pen", "folder", "ruler", "marker", "eraser"], 2)
    a, b = rng.randint(2, 6), rng.randint(2, 9)
    p, q = rng.randrange(125, 480, 5), rng.randrange(45, 190, 5)
    total = a * p + b * q
    note = next(n for n in (2000, 5000, 10000) if n > total)
    return Problem(
        "Change from a note",
        f"{name} buys {plural(a, first)} at {money(p)} each and {plural(b, second)} at {money(q)} "
        f"each, and pays with a {money(note)} note. How much change should {name} get?",
        (
            f"The {first}s cost {a} × {money(p)} = {money(a * p)}.",
            f"The {second}s cost {b} × {money(q)} = {money(b * q)}.",
            f"Together that is {money(a * p)} + {money(b * q)} = {money(total)}.",
            f"The change is {money(note)} - {money(total)} = {money(note - total)}.",
        ),
        f"{name} gets {money(note - total)} back.",
    )


def discount(rng: Random) -> Problem:
    """A discount followed by a tax, and why the order does not matter."""
    price, off, tax = (
        rng.randrange(4000, 30000, 2000),
        rng.randrange(10, 45, 5),
        rng.choice([5, 10]),
    )
    thing = rng.choice(["jacket", "bicycle helmet", "desk lamp", "pair of boots", "backpack"])
    cut = Fraction(price * (100 - off), 100)
    final = cut * (100 + tax) / 100
    return Problem(
        "Discount and tax",
        f"A {thing} is marked {money(price)}. The shop takes {off}% off, and a sales tax of {tax}% "
        "is then added to the reduced price. What does the customer pay, and would it change if "
        "the tax were added before the discount?",
        (
            f"After the discount {100 - off}% of the price remains: "
            f"{100 - off}/100 × {money(price)} = {money(cut)}.",
            f"The tax makes that {100 + tax}% of itself: "
            f"{100 + tax}/100 × {money(cut)} = {money(final)}.",
            "Both steps are multiplications, and multiplication may be done in either order, "
            "so adding the tax first gives the same amount.",
        ),
        f"The customer pays {money(final)} either way.",
    )


def reverse_percent(rng: Random) -> Problem:
    """The amount before a percentage change."""
    rise, before = rng.choice([5, 10, 15, 20, 25, 40]), rng.randrange(200, 2000, 20)
    after = before * (100 + rise) // 100
    factor, wrong = number(Fraction(100 + rise, 100)), Fraction(after * (100 - rise), 100)
    where = rng.choice(["A library's membership", "A village's population", "A club's budget"])
    return Problem(
        "Before the increase",
        f"{where} grew by {rise}% in one year and now stands at {after}. What was it a year ago?",
        (
            f"Let x be last year's figure. Growing by {rise}% means multiplying by {factor}, so "
            f"{factor} · x = {after}.",
            f"Dividing, x = {after} ÷ {factor} = {before}.",
            f"A common mistake is to take {rise}% off {after}, which gives {number(wrong)}: the "
            "percentage belongs to the old figure, not to the new one.",
        ),
        f"It was {before}.",
    )


def trip(rng: Random) -> Problem:
    """The average speed of a trip in two legs."""
    v, w = rng.sample([40, 48, 60, 72, 80, 90], 2)
    distance = math.lcm(v, w) // rng.choice([1, 2]) * rng.choice([1, 2])
    out, back = Fraction(distance, v), Fraction(distance, w)
    mean = 2 * distance / (out + back)
    return Problem(
        "Average speed there and back",
        f"A van drives {distance} km to a depot at {v} km/h and returns on the same road at "
        f"{w} km/h. What is its average speed for the whole trip?",
        (
            f"The way there takes {distance}/{v} = {mixed(out)} hours.",
            f"The way back takes {distance}/{w} = {mixed(back)} hours.",
            f"In all it covers {2 * distance} km in {mixed(out + back)} hours.",
            f"Average speed is total distance over total time: {2 * distance} ÷ "
            f"{mixed(out + back)} = {mixed(mean)} km/h.",
            f"Note that this is less than {mixed(Fraction(v + w, 2))} km/h, the mean of the two "
            "speeds, since more time is spent at the lower one.",
        ),
        f"The average speed is {mixed(mean)} km/h.",
    )


def trains(rng: Random) -> Problem:
    """Two trains that approach each other."""
    v, w, hours = rng.randrange(50, 110, 5), rng.randrange(50, 110, 5), rng.randint(2, 5)
    head = rng.choice([1, 2])
    distance = v * head + (v + w) * hours
    return Problem(
        "Two trains",
        f"Two stations are {distance} km apart. A train leaves the first at {v} km/h; "
        f"{plural(head, 'hour')} later another leaves the second towards it at {w} km/h. How long "
        "after the second departure do they meet, and how far from the first station?",
        (
            f"When the second train starts, the first has gone {v} × {head} = {v * head} km, and "
            f"the gap is {distance} - {v * head} = {distance - v * head} km.",
            f"From then on the gap closes at {v} + {w} = {v + w} km/h.",
            f"They meet after {distance - v * head} ÷ {v + w} = {hours} hours.",
            f"The first train has then travelled for {head + hours} hours: "
            f"{v} × {head + hours} = {v * (head + hours)} km.",
        ),
        f"They meet {hours} hours later, {v * (head + hours)} km from the first station.",
    )


def painters(rng: Random) -> Problem:
    """Two workers together."""
    a, b = rng.sample([3, 4, 5, 6, 8, 9, 10, 12, 15], 2)
    rate = Fraction(1, a) + Fraction(1, b)
    one, two = rng.sample(NAMES, 2)
    return Problem(
        "Working together",
        f"{one} can paint a fence in {a} hours; {two} needs {b} hours for the same fence. How long "
        "do they take if they work together at their usual pace?",
        (
            f"In one hour {one} paints 1/{a} of the fence and {two} paints 1/{b} of it.",
            f"Together they paint 1/{a} + 1/{b} = {rate} of it in an hour.",
            f"The whole fence takes 1 ÷ {rate} = {mixed(1 / rate)} hours, or {mixed(60 / rate)} "
            "minutes.",
            f"As a check, that is less than {min(a, b)} hours, what the faster one needs alone.",
        ),
        f"Together they need {mixed(1 / rate)} hours.",
    )


def recipe(rng: Random) -> Problem:
    """A recipe scaled by a fraction."""
    base, wanted = rng.sample([4, 6, 8, 10, 12, 15], 2)
    flour, milk = Fraction(rng.randint(5, 13), 4), Fraction(rng.randint(4, 8), 3)
    eggs, scale = rng.randint(2, 5), Fraction(wanted, base)
    return Problem(
        "Scaling a recipe",
        f"A recipe for {base} people needs {mixed(flour)} cups of flour, {mixed(milk)} cups of "
        f"milk and {eggs} eggs. How much of each is needed for {wanted} people?",
        (
            f"Every amount is multiplied by {wanted}/{base}"
            + ("." if scale.denominator == base else f", which is {scale}."),
            f"Flour: {mixed(flour)} × {scale} = {mixed(flour * scale)} cups.",
            f"Milk: {mixed(milk)} × {scale} = {mixed(milk * scale)} cups.",
            f"Eggs: {eggs} × {scale} = {mixed(eggs * scale)}"
            + ("." if (eggs * scale).denominator == 1 else ", which a cook would round."),
        ),
        f"{mixed(flour * scale)} cups of flour, {mixed(milk * scale)} cups of milk and "
        f"{mixed(eggs * scale)} eggs.",
    )


def ages(rng: Random) -> Problem:
    """Two ages from a present and a past relation."""
    years, times, then = rng.randint(2, 6), rng.randint(4, 5), rng.randint(6, 10)
    child, parent = then + years, times * then + years
    older = parent - child
    name = rng.choice(NAMES)
    return Problem(
        "Ages",
        f"{name}'s mother is {older} years older than {name}. {years} years ago she was {times} "
        f"times as old as {name} was. How old are they now?",
        (
            f"Let n be {name}'s age. The mother is n + {older}.",
            f"{years} years ago: n + {older - years} = {times}(n - {years}).",
            f"Expanding, n + {older - years} = {times}n - {times * years}, so "
            f"{times - 1}n = {older - years + times * years}.",
            f"Hence n = {child}, and the mother is {parent}.",
            f"Check: {years} years ago they were {then} and {parent - years}, and "
            f"{times} × {then} = {parent - years}.",
        ),
        f"{name} is {child} and the mother is {parent}.",
    )


def mixture(rng: Random) -> Problem:
    """Two solutions mixed to a wanted strength."""
    low, high = rng.choice([10, 15, 20]), rng.choice([45, 50, 60, 70])
    target, total = rng.randrange(low + 5, high, 5), rng.choice([6, 10, 12, 20])
    strong = Fraction(total * (target - low), high - low)
    weak = total - strong
    return Problem(
        "A mixture",
        f"A chemist needs {total} litres of a {target}% acid solution but only has a {low}% and a "
        f"{high}% solution. How many litres of each should be mixed?",
        (
            f"Let x be the litres of the {high}% solution; then {total} - x litres are of the "
            f"{low}% one.",
            f"Pure acid on both sides: {high}x + {low}({total} - x) = {target} · {total}.",
            f"So {high - low}x = {target * total} - {low * total} = {(target - low) * total}, "
            f"and x = {mixed(strong)}.",
            f"That leaves {total} - {mixed(strong)} = {mixed(weak)} litres of the weak solution.",
        ),
        f"{mixed(strong)} litres of the {high}% and {mixed(weak)} litres of the {low}% solution.",
    )


def interest(rng: Random) -> Problem:
    """Simple against compound interest."""
    start, rate, years = rng.randrange(1000, 9000, 500), rng.choice([2, 3, 4, 5, 6]), 3
    simple = start * rate * years
    factor = Fraction(100 + rate, 100)
    lines = [
        f"After year {year}: {money(start * 100 * factor**year, exact=False)}."
        for year in range(1, years + 1)
    ]
    gain = round(start * 100 * (factor**years - 1))
    return Problem(
        "Simple and compound interest",
        f"{money(start * 100)} is saved for {years} years at {rate}% a year. Compare the interest "
        "when it is paid out every year with the interest when it is left in the account.",
        (
            f"Paid out: each year brings {rate}% of {money(start * 100)}, which is "
            f"{money(start * rate)}, so {years} years bring {money(simple)}.",
            f"Left in: the balance is multiplied by {float(factor)} every year.",
            *lines,
            f"The interest is then {money(gain)}, which is {money(gain - simple)} more.",
        ),
        f"{money(simple)} paid out, {money(gain)} left in.",
    )


def ratio(rng: Random) -> Problem:
    """A sum shared in a ratio."""
    parts, unit = rng.sample([1, 2, 3, 4, 5, 7], 3), rng.randrange(12, 95)
    people = rng.sample(NAMES, 3)
    total = sum(parts) * unit
    shares = [f"{p}: {k} × {unit} = {k * unit}." for p, k in zip(people, parts, strict=True)]
    return Problem(
        "Sharing in a ratio",
        f"{people[0]}, {people[1]} and {people[2]} share {total} points in the ratio "
        f"{parts[0]} : {parts[1]} : {parts[2]}. How many does each get?",
        (
            f"There are {' + '.join(map(str, parts))} = {sum(parts)} equal parts.",
            f"One part is {total} ÷ {sum(parts)} = {unit}.",
            *shares,
            f"The shares add up to {total}, as they should.",
        ),
        ", ".join(f"{p} {k * unit}" for p, k in zip(people, parts, strict=True)) + ".",
    )


def missing_score(rng: Random) -> Problem:
    """The score that lifts a mean to a goal."""
    count = rng.randint(4, 6)
    scores = [rng.randint(62, 90) for _ in range(count)]
    goal = math.ceil(Fraction(sum(scores), count)) + rng.choice([0, 1, 2])
    need = goal * (count + 1) - sum(scores)
    name = rng.choice(NAMES)
    return Problem(
        "The score that is missing",
        f"{name} scored {', '.join(map(str, scores))} in {count} tests. What score in the next "
        f"test would make the mean exactly {goal}?",
        (
            f"A mean of {goal} over {count + 1} tests needs {goal} × {count + 1} = "
            f"{goal * (count + 1)} points in all.",
            f"So far there are {' + '.join(map(str, scores))} = {sum(scores)} points.",
            f"The next test must bring {goal * (count + 1)} - {sum(scores)} = {need}.",
        ),
        f"{name} needs {need}.",
    )


def garden(rng: Random) -> Problem:
    """A path of even width around a rectangle."""
    a, b, w = rng.randint(8, 20), rng.randint(5, 14), rng.choice([1, 2, 3])
    length, width = a + 2 * w, b + 2 * w
    return Problem(
        "A path around a garden",
        f"A rectangular garden measures {a} m by {b} m. A path {w} m wide runs around the outside. "
        "What is the area of the path, and how long is its outer edge?",
        (
            f"With the path, the rectangle is {a} + 2·{w} = {length} m by {b} + 2·{w} = {width} m.",
            f"Its area is {length} × {width} = {length * width} square metres.",
            f"The garden itself is {a} × {b} = {a * b} square metres.",
            f"The path is the difference, {length * width} - {a * b} = {length * width - a * b} "
            "square metres.",
            f"The outer edge is 2 × ({length} + {width}) = {2 * (length + width)} m.",
        ),
        f"The path covers {length * width - a * b} m²; its outer edge is {2 * (length + width)} m.",
    )


def tank(rng: Random) -> Problem:
    """Filling a box-shaped tank."""
    a, b, h = rng.randrange(40, 120, 10), rng.randrange(30, 80, 10), rng.randrange(30, 70, 10)
    rate = rng.choice([4, 5, 6, 8])
    litres = Fraction(a * b * h, 1000)
    return Problem(
        "Filling a tank",
        f"A tank is {a} cm long, {b} cm wide and {h} cm high. A tap gives {rate} litres a minute. "
        "How long does it take to fill the empty tank to half its height?",
        (
            f"The volume is {a} × {b} × {h} = {a * b * h} cubic centimetres.",
            f"A litre is 1000 cubic centimetres, so the tank holds {mixed(litres)} litres.",
            f"Half of it is {mixed(litres / 2)} litres.",
            f"At {rate} litres a minute that takes {mixed(litres / 2)} ÷ {rate} = "
            f"{mixed(litres / 2 / rate)} minutes.",
        ),
        f"It takes {mixed(litres / 2 / rate)} minutes.",
    )


def ladder(rng: Random) -> Problem:
    """Pythagoras with a whole-number triple."""
    k = rng.choice([2, 3, 4, 6])
    a, b, c = (k * v for v in rng.choice([(3, 4, 5), (5, 12, 13), (8, 15, 17), (7, 24, 25)]))
    return Problem(
        "A ladder",
        f"A ladder {c} dm long leans against an upright wall with its foot {a} dm from the wall. "
        "How high up the wall does it reach?",
        (
            "Wall, ground and ladder form a right-angled triangle with the ladder as hypotenuse.",
            f"By Pythagoras, height² = {c}² - {a}² = {c * c} - {a * a} = {b * b}.",
            f"The positive root is √{b * b} = {b}.",
        ),
        f"It reaches {b} dm up the wall.",
    )


def coins(rng: Random) -> Problem:
    """Two kinds of coins from a count and a value."""
    small, large = rng.choice([(5, 10), (5, 25), (10, 25), (10, 50), (20, 50)])
    x, y = rng.randint(6, 30), rng.randint(6, 30)
    n, total = x + y, small * x + large * y
    more = total - n * small
    return Problem(
        "Coins in a jar",
        f"A jar holds {n} coins, all of {small} or {large} cents, worth {money(total)} together. "
        "How many of each are there?",
        (
            f"Suppose all {n} coins were of {small} cents: they would be worth {money(n * small)}.",
            f"The real value is {money(total)}, which is {more} cents more.",
            f"Each coin of {large} cents in place of one of {small} adds {large - small} cents.",
            f"So there are {more} ÷ {large - small} = {y} of the larger coins, and {n} - {y} = {x} "
            "of the smaller.",
        ),
        f"{x} coins of {small} cents and {y} coins of {large} cents.",
    )


def legs(rng: Random) -> Problem:
    """Heads and legs, by two equations."""
    birds, goats = rng.randint(7, 40), rng.randint(7, 40)
    heads, feet = birds + goats, 2 * birds + 4 * goats
    two, four = rng.choice([("ducks", "sheep"), ("hens", "goats"), ("geese", "cows")])
    return Problem(
        "Heads and legs",
        f"On a farm there are only {two} and {four}. Counting gives {heads} heads and {feet} legs. "
        "How many animals of each kind are there?",
        (
            f"Let d be the number of {two} and s the number of {four}.",
            f"Heads: d + s = {heads}. Legs: 2d + 4s = {feet}.",
            f"Halve the second equation: d + 2s = {feet // 2}.",
            f"Subtract the first: s = {feet // 2} - {heads} = {goats}, hence d = {heads} - {goats} "
            f"= {birds}.",
        ),
        f"{birds} {two} and {goats} {four}.",
    )


def unit_price(rng: Random) -> Problem:
    """Which of two packs is cheaper by weight."""
    g, h = rng.sample([250, 400, 500, 750, 800, 1200], 2)
    p, q = (round(w * rng.uniform(0.42, 0.70)) for w in (g, h))
    a, b = round(Fraction(100 * p, g), 2), round(Fraction(100 * q, h), 2)
    better = g if a < b else h
    thing = rng.choice(["rice", "coffee", "oats", "lentils"])
    return Problem(
        "Comparing prices",
        f"A {g} g pack of {thing} costs {money(p)}; a {h} g pack costs {money(q)}. Which one is "
        "the better buy?",
        (
            "Compare what 100 g cost.",
            f"First pack: {money(p)} ÷ {g} × 100 ≈ {float(a):.2f} cents per 100 g.",
            f"Second pack: {money(q)} ÷ {h} × 100 ≈ {float(b):.2f} cents per 100 g.",
        ),
        "They cost the same." if a == b else f"The {better} g pack is cheaper by weight.",
    )


SHAPES: tuple[Shape, ...] = (
    *(shopping, discount, reverse_percent, trip, trains, painters, recipe, ages, mixture, interest),
    *(ratio, missing_score, garden, tank, ladder, coins, legs, unit_price),
)
