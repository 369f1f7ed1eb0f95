"""Small talk between two people: dialogues of chitchat-dataset, chosen by reading them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

Turns: TypeAlias = list[str]
# Clean English about harmless things, without names of the two or anything else that is private.
CHOSEN = (
    *("c2328613", "26d0813a", "43b15f6e", "025f2adc", "f9d4ff9b", "42aafb36", "cf36a525"),
    *("eb4945e5", "c1f74492", "3208f225", "8c8b671e", "ba057745", "5ce5f636"),
    *("df8ee628", "90b087a2", "2ce70b90", "232fa9a4", "de6045c5", "9c4595ee"),
    *("32b36e08", "daae7d65", "3db0de5d", "3e0dfc0e", "bfe70462", "32c8f969"),
    *("d66e2698", "a7cc93de", "a93d0287", "01466e39", "caaa5e2d", "ffb3166a"),
    *("2cca0aeb", "c9a87901", "bfb69c3b", "65c59023", "33642fd4", "ba102080", "3706df85"),
    *("7ef14637", "b7b0664a", "c7b4f4cb"),
)
GREETINGS = ("hi", "hey", "hello", "howdy")


def dialogues(dataset: Path) -> Iterator[tuple[Turns, str]]:
    """The chosen dialogues, the messages one person sends in a row joined, and their ids.

    The question that both were shown opens the dialogue where the first message answers it.
    """
    every = json.loads(dataset.read_text("utf-8"))
    by_start = {name[:8]: talk for name, talk in every.items()}
    for name in CHOSEN:
        talk = by_start[name]
        turns: Turns = []
        last = None
        for message in (m for group in talk["messages"] for m in group):
            text = " ".join(message["text"].split())
            if text and message["sender"] == last:
                turns[-1] += f"\n{text}"
            elif text:
                turns.append(text)
                last = message["sender"]
        greeted = turns[0].lower().split()[0].strip("!,.") in GREETINGS
        yield ([*turns] if greeted or not talk.get("prompt") else [talk["prompt"], *turns]), name
