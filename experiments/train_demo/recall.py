"""Synthetic in-context recall: facts hidden in real text, and questions about them far behind.

Three kinds: a number stated in a sentence and asked for later; a list of settings and look-ups in it; a passage of the
text quoted again. They give long-range selection something to learn that plain manuals seldom ask for.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

COLOURS = (
    "amber", "black", "blue", "bronze", "brown", "copper", "crimson", "golden", "green", "grey", "ivory", "orange",
    "pale", "pink", "purple", "red", "scarlet", "silver", "violet", "white", "yellow", "dark", "bright", "striped",
)  # fmt: skip
ANIMALS = (
    "badger", "bear", "camel", "cat", "crow", "deer", "dog", "dolphin", "duck", "eagle", "elephant", "falcon", "fish",
    "fox", "frog", "goat", "goose", "hare", "hawk", "horse", "lion", "lizard", "monkey", "mouse", "otter", "owl", "pig",
    "rabbit", "raven", "seal", "sheep", "snake", "spider", "swan", "tiger", "turtle", "whale", "wolf",
)  # fmt: skip
HELD_OUT_ANIMALS = ("beetle", "donkey", "heron", "panther", "penguin", "squirrel", "toad", "zebra")
"""In no training text's facts: needle checks ask for these."""
NUMBERS = ("secret number", "access code", "room number", "serial number", "magic number", "phone number")
SECTIONS = ("settings", "options", "limits", "defaults", "variables", "registers")
KEYS = (
    "size", "port", "depth", "level", "color", "width", "height", "index", "limit", "timeout", "offset", "retries",
    "length", "weight", "count", "delay", "buffer", "page", "rate", "mode",
)  # fmt: skip
DIGITS = 5
ANSWER_WEIGHT = 4.0
"""Weight of an answer's tokens in the loss; those of the stated number get 0, because nothing predicts them."""

Encode = Callable[[str], list[int]]


@dataclasses.dataclass(frozen=True)
class Insert:
    """Tokens to put into a text, and the weight of each in the loss."""

    tokens: np.ndarray
    weights: np.ndarray


def number(rng: np.random.Generator) -> str:
    """Random digits."""
    return "".join(map(str, rng.integers(0, 10, DIGITS)))


def fact(rng: np.random.Generator, animals: tuple[str, ...] = ANIMALS) -> tuple[str, str, str]:
    """A statement up to its number, the question up to its answer, and the number."""
    quantity, colour, animal = rng.choice(NUMBERS), rng.choice(COLOURS), rng.choice(animals)
    says = f"The {quantity} of the {colour} {animal} is "
    return says, f"What is the {quantity} of the {colour} {animal}? {says}", number(rng)


class RecallTasks:
    """Puts tasks into windows of tokens."""

    def __init__(self, encode: Encode, newline: np.ndarray):
        """Takes `encode`, text to ids, and `newline`, bool [V], tokens whose text ends a line."""
        self.encode, self.newline = encode, newline

    def insert(self, *parts: tuple[str, float]) -> Insert:
        """Encodes texts, each with the weight of its tokens, as one insert."""
        ids = [(self.encode(text), weight) for text, weight in parts]
        tokens = np.concatenate([np.asarray(text_ids, np.int32) for text_ids, _ in ids])
        return Insert(tokens, np.concatenate([np.full(len(text_ids), weight, np.float32) for text_ids, weight in ids]))

    def facts(self, rng: np.random.Generator, count: int) -> list[tuple[float, Insert]]:
        """Statements at random places in [0, 1), and questions about each at later places."""
        placed = []
        for _ in range(count):
            says, asks, answer = fact(rng)
            at = rng.uniform(0, 0.9)
            placed.append((at, self.insert(("\n" + says, 1), (answer, 0), (".\n", 1))))
            for _ in range(rng.integers(1, 3)):
                placed.append((rng.uniform(at, 1), self.insert(("\n" + asks, 1), (answer, ANSWER_WEIGHT), (".\n", 1))))
        return placed

    def settings(self, rng: np.random.Generator, length: int) -> list[tuple[float, Insert]]:
        """A list of settings, and look-ups of them at later places."""
        section = rng.choice(SECTIONS)
        names = [f"{a}_{b}" for a in rng.permutation(COLOURS)[:6] for b in rng.permutation(KEYS)[:4]]
        names = names[: max(4, min(len(names), length // 100))]
        values = {name: number(rng) for name in names}
        parts: list[tuple[str, float]] = [(f"\n[{section}]\n", 1)]
        for name in rng.permutation(names):
            parts += [(f"{name} = ", 1), (values[name], 0), ("\n", 1)]
        at = rng.uniform(0, 0.6)
        placed = [(at, self.insert(*parts))]
        for name in rng.choice(names, max(1, len(names) // 4), replace=False):
            look_up = self.insert((f"\nIn [{section}]: {name} = ", 1), (values[name], ANSWER_WEIGHT), ("\n", 1))
            placed.append((rng.uniform(at, 1), look_up))
        return placed

    def quotations(self, rng: np.random.Generator, text: np.ndarray, count: int) -> list[tuple[float, Insert]]:
        """Passages of 16 to 48 tokens of the text, quoted again at later places."""
        placed = []
        opening, closing = self.encode('\nAs quoted above: "'), self.encode('"\n')
        for _ in range(count):
            start = int(rng.integers(0, max(1, int(0.8 * len(text)))))
            passage = text[start : start + int(rng.integers(16, 49))]
            weights = np.ones(len(opening) + len(passage) + len(closing), np.float32)
            weights[len(opening) + 8 : len(opening) + len(passage)] = 2.0
            insert = Insert(np.concatenate([opening, passage, closing]).astype(np.int32), weights)
            placed.append((rng.uniform((start + len(passage)) / len(text), 1), insert))
        return placed

    def fill(self, rng: np.random.Generator, text: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """A window of the text's own length with tasks in it.

        Args:
          rng: of all choices.
          text: int32 [T].

        Returns:
          tokens int32 [T], weights float32 [T] and the number of tokens that are tasks.
        """
        length = len(text)
        kind = rng.integers(0, 4)
        if kind <= 1:
            placed = self.facts(rng, max(1, length // int(rng.integers(300, 1200))))
        elif kind == 2:
            placed = self.settings(rng, length)
        else:
            placed = self.quotations(rng, text, max(1, length // int(rng.integers(300, 1000))))
        inserted = sum(len(insert.tokens) for _, insert in placed)
        if inserted > length // 2:
            return text, np.ones(length, np.float32), 0
        text = text[: length - inserted]
        ends = np.flatnonzero(self.newline[text]) + 1
        tokens, weights, done = [], [], 0
        for place, insert in sorted(placed, key=lambda pair: pair[0]):
            at = int(place * len(text))
            after = ends[np.searchsorted(ends, at)] if len(ends) and ends[-1] >= at else at
            at = max(done, int(after) if after - at < 64 else at)
            tokens += [text[done:at], insert.tokens]
            weights += [np.ones(at - done, np.float32), insert.weights]
            done = at
        tokens.append(text[done:])
        weights.append(np.ones(len(text) - done, np.float32))
        return np.concatenate(tokens).astype(np.int32), np.concatenate(weights), inserted
