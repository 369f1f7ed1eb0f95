"""Dialogues in which an assistant is asked for something and gives the right answer."""
# ruff: noqa: RUF001  (the multiplication sign is meant)

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import TypeAlias

from maths_notation import money, number, plural
from maths_words import SHAPES
from snippets import TASKS, Task

Exchanges: TypeAlias = list[tuple[str, str]]
TOPICS = (
    *(
        "assert",
        "with",
        "for",
        "try",
        "while",
        "import",
        "lambda",
        "yield",
        "del",
        "global",
        "pass",
    ),
    *("truth", "comparisons", "naming", "bltin-null-object", "continue", "nonlocal", "objects"),
    *("typesmapping", "function", "raise", "exceptions", "booleans", "class", "return", "break"),
)
MODULES = (
    *("bisect.py", "calendar.py", "fnmatch.py", "glob.py", "html/__init__.py"),
    *("statistics.py", "string.py", "tempfile.py"),
    *("base64.py", "filecmp.py", "genericpath.py", "heapq.py", "linecache.py", "reprlib.py"),
)
UNITS = (
    ("mile", "miles", "kilometres", Fraction(1609344, 1000000)),
    ("pound", "pounds", "kilograms", Fraction(45359237, 100000000)),
    ("inch", "inches", "centimetres", Fraction(254, 100)),
    ("foot", "feet", "metres", Fraction(3048, 10000)),
    ("US gallon", "US gallons", "litres", Fraction(3785411784, 1000000000)),
    ("nautical mile", "nautical miles", "kilometres", Fraction(1852, 1000)),
)


def python_topic(topics: Path, name: str) -> Exchanges:
    """A chapter of Python's help, told in two answers; empty where it is too short or too long."""
    (assignment,) = ast.parse(topics.read_text("utf-8")).body
    assert isinstance(assignment, ast.Assign)
    lines = ast.literal_eval(assignment.value)[name].split("\n")
    title = lines[0].replace('"', "`")
    body = re.split(r"\n[^\n]+\n[*=~-]{4,}\n", "\n".join(lines[2:]))[0]
    paragraphs: list[str] = []
    for block in body.strip("\n").split("\n\n"):
        if "::=" in block:
            if paragraphs and paragraphs[-1].endswith(":"):
                paragraphs.pop()  # it announced the grammar
        elif not re.match(r"\s*(See also|Changed in|New in|-?\[|Deprecated|\*\*PEP)", block):
            plain = not re.search(r"^( |\* |\d+\. )", block, re.MULTILINE)
            paragraphs.append(
                re.sub(r"(?<=\w-)\n", "", block).replace("\n", " ") if plain else block
            )
    first = cut(paragraphs, 500)
    second = cut(paragraphs[len(first) :], 1000)
    if not first or not second or sum(map(len, [*first, *second])) > 4000:
        return []
    ask = f"Can you explain this part of Python to me: {title}"
    return [(ask, "\n\n".join(first)), ("Please go on.", "\n\n".join(second))]


def cut(paragraphs: list[str], size: int) -> list[str]:
    """The first paragraphs of about `size` characters, not parted from an example or a list."""
    length, best = 0, 0
    for count, (this, after) in enumerate(pairwise([*paragraphs, ""]), 1):
        length += len(this)
        if not (re.match(r" |\* |\d+\. ", after) or this.endswith((":", "following code"))):
            best = count
            if length > size:
                break
    return paragraphs[:best]


def python_functions(library: Path, module: str) -> Iterator[tuple[str, Exchanges]]:
    """Questions about the documented functions of a module of the standard library."""
    source = (library / module).read_text("utf-8")
    dotted = module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        doc, code = ast.get_docstring(node), ast.get_source_segment(source, node)
        if not doc or len(doc) < 60 or not code or not 300 < len(code) < 1800:
            continue
        arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
        keyword = [a.arg for a in node.args.kwonlyargs]
        takes = ", ".join(f"`{a}`" for a in arguments) or "no positional arguments"
        only = f" By keyword only: {', '.join(f'`{a}`' for a in keyword)}." if keyword else ""
        call = f"`{dotted}.{node.name}({ast.unparse(node.args)})`"
        yield (
            node.name,
            [
                (f"What does `{node.name}` in Python's `{dotted}` module do?", doc),
                ("How do I call it?", f"The signature is {call}. It takes {takes}.{only}"),
                (
                    "I'd like to see how it is written.",
                    f"This is its source in the standard library:\n\n```python\n{code}\n```",
                ),
            ],
        )


def write_code(task: Task) -> Exchanges:
    """A wish for a function, what it returns, and why it is written so."""
    name, source = task.function.__name__, inspect.getsource(task.function).strip()
    shown = [
        f">>> {name}({', '.join(map(repr, call))})\n{task.function(*call)!r}" for call in task.calls
    ]
    return [
        (
            f"Please write a Python function that {task.wish}.",
            f"Here is one:\n\n```python\n{source}\n```",
        ),
        (
            "Can you show me what it returns?",
            "Of course:\n\n```pycon\n" + "\n".join(shown) + "\n```",
        ),
        (task.question, task.reason),
    ]


def units(rng: Random) -> Exchanges:
    """A conversion, back again, and a rule of thumb."""
    one, big, small, factor = rng.choice(UNITS)
    n, m = rng.randint(3, 90), rng.randint(3, 90)
    there, back = n * factor, m / factor
    return [
        (
            rng.choice([f"How many {small} are {n} {big}?", f"Convert {n} {big} to {small}."]),
            f"One {one} is {float(factor):.6g} {small}, so {n} {big} are {n} × "
            f"{float(factor):.6g} = **{float(there):.2f} {small}** (rounded to two decimals).",
        ),
        (
            f"And {m} {small} in {big}?",
            f"Now we divide instead of multiplying: {m} ÷ {float(factor):.6g} = "
            f"**{float(back):.2f} {big}**.",
        ),
        (
            "Could I have a short table to print?",
            f"| {big} | {small} |\n|---|---|\n"
            + "\n".join(f"| {k} | {float(k * factor):.2f} |" for k in (1, 2, 5, 10, 20, 50)),
        ),
    ]


def temperature(rng: Random) -> Exchanges:
    """Celsius and Fahrenheit."""
    c, f = rng.randrange(-20, 45), rng.randrange(20, 110)
    return [
        (
            f"It is {c} °C here. What is that in Fahrenheit?",
            f"Multiply by 9/5 and add 32: {c} × 9/5 + 32 = {number(Fraction(9 * c, 5) + 32)} °F.",
        ),
        (
            f"My oven book is American. What would {10 * f // 2} °F be in Celsius?",
            f"The other way round, subtract 32 and multiply by 5/9: ({10 * f // 2} - 32) × 5/9 ≈ "
            f"{(10 * f // 2 - 32) * 5 / 9:.0f} °C.",
        ),
        rng.choice(
            [
                (
                    "Is there a temperature where both scales agree?",
                    "Yes, exactly one. Setting x = 9/5 x + 32 gives -4/5 x = 32, so x = -40. At "
                    "-40 degrees both scales show the same number.",
                ),
                (
                    f"And the {c} °C in kelvin?",
                    f"Kelvin counts from absolute zero, -273.15 °C, in steps of the same size: "
                    f"{c} + 273.15 = {c + 273.15:.2f} K.",
                ),
            ]
        ),
    ]


def bill(rng: Random) -> Exchanges:
    """A restaurant bill with a tip, shared."""
    total, tip = rng.randrange(4000, 19000, 100), rng.choice([10, 12, 15, 18, 20])
    people, extra = rng.randint(3, 6), total * tip // 100
    cents, left = divmod(total + extra, people)
    shares = (
        f"{left} of you pay {money(cents + 1)} and {people - left} pay {money(cents)}, which adds "
        f"up to {money(total + extra)} to the cent."
    )
    return [
        (
            f"Our dinner was {money(total)} and we want to tip {tip}%. How much is that?",
            f"{tip}% of {money(total)} is {money(extra)}, so the whole bill comes to "
            f"{money(total + extra)}.",
        ),
        (
            f"There are {people} of us. How do we split it fairly?",
            shares if left else f"Everyone pays {money(cents)}.",
        ),
        (
            "What if we had tipped 5% more?",
            f"Another 5% of {money(total)} is {money(total // 20)}, about "
            f"{money(Fraction(total, 20 * people), exact=False)} more for each of you.",
        ),
    ]


def calendar(rng: Random) -> Exchanges:
    """Days between dates, and weekdays."""
    start, length = date(2024, 1, 1) + timedelta(days=rng.randrange(900)), rng.randrange(20, 200)
    days = [start + timedelta(days=k) for k in range(length + 1)]
    first, third, two_thirds, last = (
        f"{day:%A}, {day.day} {day:%B %Y}"
        for day in (start, days[length // 3], days[2 * length // 3], days[-1])
    )
    working = sum(day.weekday() < 5 for day in days[:-1])
    return [
        (
            f"How many days are there from {first} to {last}?",
            f"There are {plural(length, 'day')}, that is {plural(length // 7, 'week')} and "
            f"{plural(length % 7, 'day')}.",
        ),
        (
            "How many of them are working days, if I count the first day but not the last?",
            f"Counting Monday to Friday, and leaving public holidays aside, there are {working}.",
        ),
        (
            "I'd like two check-ins, after a third and after two thirds of the time.",
            f"Good dates would be {third}, and {two_thirds}.",
        ),
    ]


def shopping_list(rng: Random) -> Exchanges:
    """A list put into categories, priced, and as JSON."""
    shelf = {"apples": 250, "carrots": 120, "spinach": 230, "pears": 310, "leeks": 190}
    pantry = {"rice": 210, "lentils": 260, "flour": 95, "olive oil": 890, "oats": 175}
    fresh, dry = rng.sample(sorted(shelf), 3), rng.sample(sorted(pantry), 2)
    items = rng.sample([*fresh, *dry], 5)
    prices = {**shelf, **pantry}
    dear = max(items, key=prices.__getitem__)
    rows = "\n".join(f"| {item} | {money(prices[item])} |" for item in items)
    total = sum(prices[item] for item in items)
    as_json = json.dumps({"fresh": fresh, "pantry": dry}, indent=2)
    return [
        (
            f"Sort this shopping list for me: {', '.join(items)}.",
            "**Fresh**\n"
            + "\n".join(f"- {item}" for item in sorted(fresh))
            + "\n\n**Pantry**\n"
            + "\n".join(f"- {item}" for item in sorted(dry)),
        ),
        (
            "The prices are "
            + ", ".join(f"{item} {money(prices[item])}" for item in items)
            + ". Please make a table with the total.",
            f"| item | price |\n|---|---|\n{rows}\n| **total** | **{money(total)}** |",
        ),
        (
            "What is the most expensive item, and what share of the total is it?",
            f"The {dear}: {money(prices[dear])} is {100 * prices[dear] / total:.0f}% of the total.",
        ),
        (
            "Thanks. Can I have the sorted list as JSON, too?",
            f"```json\n{as_json}\n```",
        ),
    ]


def number_facts(rng: Random) -> Exchanges:
    """A number in several bases, its factors, and whether it is a square."""
    n = rng.randrange(60, 1000)
    factors, rest, p = [], n, 2
    while rest > 1:
        while rest % p == 0:
            factors.append(p)
            rest //= p
        p += 1
    root = int(n**0.5)
    prime = len(factors) == 1
    return [
        (
            f"Is {n} a prime number?",
            f"Yes, {n} is prime: no prime up to {root}, the whole part of its square root, "
            "divides it."
            if prime
            else f"No. {n} = {' × '.join(map(str, factors))}.",
        ),
        (
            "What does it look like in binary and in hexadecimal?",
            f"In binary {n} is `{n:b}`, in hexadecimal `{n:x}`. Python shows them with `bin({n})` "
            f"and `hex({n})`, which give `{n:#b}` and `{n:#x}`.",
        ),
        (
            "Which square numbers are next to it?",
            f"{n} is itself a square, {root}²."
            if root * root == n
            else f"{root}² = {root * root} is below it and {root + 1}² = {(root + 1) ** 2} above, "
            f"so its square root is about {n**0.5:.3f}.",
        ),
    ]


def text_work(rng: Random) -> Exchanges:
    """Counting, sorting and rewriting a short text."""
    rivers = rng.sample(["Nile", "Danube", "Amazon", "Rhine", "Volga", "Mekong", "Indus"], 5)
    line = ", ".join(rivers)
    by_length = sorted(rivers, key=lambda r: (len(r), r))
    return [
        (
            f"Put these names in alphabetical order: {line}.",
            "\n".join(f"{k}. {name}" for k, name in enumerate(sorted(rivers), 1)),
        ),
        (
            "Now by length, the shortest first, and show the number of letters.",
            "\n".join(f"- {name} ({len(name)})" for name in by_length),
        ),
        (
            "How would I do both in Python?",
            f"```python\nnames = {sorted(rivers)!r}\nsorted(names)\n"
            "sorted(names, key=lambda name: (len(name), name))\n```\n\nThe key of the second call "
            "is a pair: names are compared by length first, and by the alphabet where the lengths "
            "are equal.",
        ),
    ]


def trip_plan(rng: Random) -> Exchanges:
    """When to leave, with stops, and what the fuel costs."""
    distance, speed = rng.randrange(240, 700, 20), rng.choice([75, 80, 90, 100])
    drive = round(Fraction(distance * 60, speed))
    stops = (drive - 1) // 120
    whole = drive + 20 * stops
    leave = 18 * 60 - whole
    use, price = rng.choice([5, 6, 7]), rng.randrange(150, 200, 5)
    litres = Fraction(distance * use, 100)
    return [
        (
            f"I have to drive {distance} km and expect to average {speed} km/h. How long is that?",
            f"{distance} ÷ {speed} is about {distance / speed:.2f} hours, which is "
            f"{drive // 60} h {drive % 60:02} min of driving.",
        ),
        (
            "I want to stop for 20 minutes after every two hours and arrive at 18:00.",
            f"That makes {plural(stops, 'stop')}, {20 * stops} minutes in all, so "
            f"the trip takes {whole // 60} h {whole % 60:02} min. Leave at "
            f"{leave // 60}:{leave % 60:02}.",
        ),
        (
            f"The car uses {use} litres for 100 km and a litre costs {money(price)}.",
            f"You need {distance} × {use} ÷ 100 = {number(litres)} litres, which costs "
            f"{money(litres * price, exact=False)}.",
        ),
    ]


def tutor(rng: Random) -> Exchanges:
    """Two word problems, worked out."""
    first, second = (shape(rng) for shape in rng.sample(SHAPES, 2))
    return [
        (first.question, f"{' '.join(first.steps)}\n\n**{first.answer}**"),
        (
            f"Thanks! One more: {second.question}",
            "\n".join(f"{n}. {step}" for n, step in enumerate(second.steps, 1))
            + f"\n\n**{second.answer}**",
        ),
    ]


OURS: tuple[Callable[[Random], Exchanges], ...] = (
    *(units, tutor, temperature, bill, calendar, tutor, shopping_list, number_facts),
    *(text_work, tutor, trip_plan),
)


def documents(rng: Random, library: Path, python: str) -> Iterator[tuple[Exchanges, str]]:
    """All instructive dialogues and their origins."""
    topics = library / "pydoc_data" / "topics.py"
    for name in TOPICS:
        if exchanges := python_topic(topics, name):
            yield exchanges, f"{python}: pydoc_data/topics.py, {name}"
    for module in MODULES:
        found = list(python_functions(library, module))
        for name, exchanges in rng.sample(found, min(1, len(found))):
            yield exchanges, f"{python}: {module}, {name}"
    for task in TASKS:
        yield write_code(task), f"quantkit: snippets.py, {task.function.__name__}"
    for kind in OURS * 4:
        yield kind(rng), f"quantkit: dialogues.py, {kind.__name__.replace('_', ' ')}"
