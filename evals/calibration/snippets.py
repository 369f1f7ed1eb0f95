"""Small functions an assistant might be asked for: their source and what they return are shown."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple


def fibonacci(n: int) -> list[int]:
    """The first n Fibonacci numbers."""
    numbers = [0, 1]
    while len(numbers) < n:
        numbers.append(numbers[-1] + numbers[-2])
    return numbers[:n]


def is_palindrome(text: str) -> bool:
    """Whether the letters and digits of text read the same both ways."""
    plain = [c.lower() for c in text if c.isalnum()]
    return plain == plain[::-1]


def primes_below(limit: int) -> list[int]:
    """All primes below limit, by the sieve of Eratosthenes."""
    is_prime = [True] * max(limit, 2)
    is_prime[0] = is_prime[1] = False
    for n in range(2, int(limit**0.5) + 1):
        if is_prime[n]:
            is_prime[n * n :: n] = [False] * len(is_prime[n * n :: n])
    return [n for n in range(limit) if is_prime[n]]


def most_common_words(text: str, n: int) -> list[tuple[str, int]]:
    """The n most frequent words, ignoring case and punctuation."""
    words = (word.strip(".,;:!?\"'()").lower() for word in text.split())
    return Counter(word for word in words if word).most_common(n)


def flat_list(nested: list[Any]) -> list[Any]:
    """A flat copy of a nested list."""
    flat: list[Any] = []
    stack = [iter(nested)]
    while stack:
        for item in stack[-1]:
            if isinstance(item, list):
                stack.append(iter(item))
                break
            flat.append(item)
        else:
            stack.pop()
    return flat


def binary_search(items: list[int], wanted: int) -> int | None:
    """The index of wanted in a sorted list, or None."""
    low, high = 0, len(items)
    while low < high:
        middle = (low + high) // 2
        if items[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low if low < len(items) and items[low] == wanted else None


def to_roman(number: int) -> str:
    """A number from 1 to 3999 in Roman numerals."""
    values = [1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1]
    signs = ["M", "CM", "D", "CD", "C", "XC", "L", "XL", "X", "IX", "V", "IV", "I"]
    roman = ""
    for value, sign in zip(values, signs, strict=True):
        roman += sign * (number // value)
        number %= value
    return roman


def run_lengths(text: str) -> list[tuple[str, int]]:
    """Each run of equal characters with its length."""
    runs: list[tuple[str, int]] = []
    for c in text:
        if runs and runs[-1][0] == c:
            runs[-1] = (c, runs[-1][1] + 1)
        else:
            runs.append((c, 1))
    return runs


def moving_average(values: list[float], width: int) -> list[float]:
    """The mean of each window of width neighbours."""
    total = sum(values[:width])
    means = [total / width]
    for old, new in zip(values, values[width:], strict=False):
        total += new - old
        means.append(total / width)
    return means


def merge_intervals(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Overlapping intervals joined, in order."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def edit_distance(a: str, b: str) -> int:
    """How many insertions, deletions and replacements turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def group_anagrams(words: list[str]) -> list[list[str]]:
    """Words with the same letters together."""
    groups: dict[str, list[str]] = {}
    for word in words:
        groups.setdefault("".join(sorted(word)), []).append(word)
    return list(groups.values())


class Task(NamedTuple):
    """A function as somebody would ask for it, two calls, and a question with its answer."""

    wish: str
    function: Callable[..., Any]
    calls: tuple[tuple[Any, ...], tuple[Any, ...]]
    question: str
    reason: str


TASKS = (
    Task(
        "lists the first n Fibonacci numbers",
        fibonacci,
        ((10,), (1,)),
        "Why not use recursion, as in the definition?",
        "The plain recursive definition computes the same numbers again and again, so its running "
        "time grows exponentially. The loop keeps the whole list and needs one addition for each "
        "new number.",
    ),
    Task(
        "checks whether a sentence is a palindrome",
        is_palindrome,
        (("Never odd or even",), ("Almost a palindrome",)),
        "Why do you build a list of characters first?",
        "Spaces, punctuation and capital letters should not count. The list keeps only letters and "
        "digits in lower case, and then one comparison with the reversed list is enough.",
    ),
    Task(
        "finds all primes below a limit",
        primes_below,
        ((30,), (2,)),
        "Why does the loop stop at the square root?",
        "Every composite number below the limit has a prime factor that is at most the square root "
        "of the limit, so it has been crossed out by then. For the same reason the crossing out "
        "can start at n * n: smaller multiples were crossed out by smaller primes.",
    ),
    Task(
        "counts the most common words of a text",
        most_common_words,
        (("The cat saw the dog, and the dog ran.", 2), ("One, two; one!", 1)),
        "What happens when two words are equally frequent?",
        "Counter.most_common keeps equal counts in the order in which the words were first seen. "
        "If you would rather have them in alphabetical order, sort by (-count, word).",
    ),
    Task(
        "flattens lists within lists without recursion",
        flat_list,
        (([1, [2, [3, 4]], 5],), ([[], [[]]],)),
        "What is the stack for?",
        "It holds one iterator for each list we are inside of. When an item is itself a list, we "
        "push an iterator over it and go on there; when an iterator is used up, the for loop's "
        "else branch pops it, and we continue where we left off in the outer list. Deep nesting "
        "therefore cannot hit Python's recursion limit.",
    ),
    Task(
        "searches a sorted list quickly",
        binary_search,
        (([2, 3, 5, 8, 13, 21], 13), ([2, 3, 5, 8, 13, 21], 4)),
        "How many comparisons does it need for a million items?",
        "The range is halved each time, so about 20: two to the power of 20 is 1,048,576. In real "
        "code you can use the bisect module, which does the same.",
    ),
    Task(
        "writes a number in Roman numerals",
        to_roman,
        ((1987,), (4,)),
        "Why are 900, 400, 90 and so on in the table?",
        "They are the numbers written by subtraction, such as CM for 900. With them in the table, "
        "always taking the largest value that fits is enough and needs no special cases.",
    ),
    Task(
        "finds runs of equal characters in a string",
        run_lengths,
        (("aaabccd",), ("",)),
        "Is there something like it in the standard library?",
        "Yes. itertools.groupby yields each run as a key and an iterator, so "
        "[(key, len(list(run))) for key, run in itertools.groupby(text)] gives the same list.",
    ),
    Task(
        "computes a moving average",
        moving_average,
        (([3.0, 5.0, 4.0, 9.0, 2.0], 3), ([1.0, 2.0], 2)),
        "Is it exact?",
        "Nearly. Updating the sum is fast, one addition and one subtraction for each step, but for "
        "floating-point numbers the rounding errors can add up over a very long list. If that "
        "matters, sum each window with math.fsum instead.",
    ),
    Task(
        "joins overlapping intervals",
        merge_intervals,
        (([(5, 8), (1, 3), (2, 4)],), ([(1, 10), (2, 3)],)),
        "Why is the list sorted first?",
        "After sorting by the start, an interval can only overlap the last one we have kept, so a "
        "single pass is enough. The sorting dominates: the time is O(n log n).",
    ),
    Task(
        "measures how different two words are",
        edit_distance,
        (("kitten", "sitting"), ("flaw", "lawn")),
        "How does the single row work?",
        "The usual table has a row for each letter of the first word, but a row depends only on "
        "the one above it. So one row is overwritten from left to right, and the variable diagonal "
        "remembers the value above and to the left before it is lost.",
    ),
    Task(
        "groups words that are anagrams of each other",
        group_anagrams,
        ((["listen", "silent", "stone", "notes", "cat"],), (["a"],)),
        "Why is the sorted word used as a key?",
        "Two words are anagrams exactly when their letters agree after sorting. The sorted letters "
        "are joined to a string because dictionary keys must be hashable, and a list is not.",
    ),
)
