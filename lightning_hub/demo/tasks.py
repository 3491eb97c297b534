"""Small tasks on invented words: easy to learn, easy to check, and each unlike the others.

A word is made of random syllables, so that no model can know it; an answer is a function of the word, so that it can
be checked without a judge.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

ChatExample = dict[str, list[dict[str, str]]]

METHODS = ("sft", "osft", "lora")
"""What ``--method`` takes; all but the first have a file beside the recipe that says where they differ from it."""

_CONSONANTS = "bcdfghjklmnprstvwz"
_VOWELS = "aeiou"


@dataclass(frozen=True)
class Task:
    """A question about a word, and its only right answer.

    Attributes:
        name: Short name.
        question: The question, with ``{word}`` in it.
        answer: The answer as a function of the word.
    """

    name: str
    question: str
    answer: Callable[[str], str]

    def conversation(self, word: str) -> ChatExample:
        """Return question and answer as one row of chat data."""
        return {
            "messages": [
                {"role": "user", "content": self.question.format(word=word)},
                {"role": "assistant", "content": self.answer(word)},
            ]
        }


SPELL = Task("spell", "Spell {word}.", lambda word: "-".join(word))
REVERSE = Task("reverse", "Reverse {word}.", lambda word: word[::-1])
SHOUT = Task("shout", "Shout {word}!", lambda word: f"{word.upper()}!")

PRETRAINING = (SPELL, REVERSE)
"""What the base model knows."""


def words(count: int, seed: int, capitals: float = 0.0) -> list[str]:
    """Return different invented words of two or three syllables.

    Args:
        count: How many.
        seed: Equal seeds give equal words.
        capitals: The share of them in capital letters.
    """
    source = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = (source.choice(_CONSONANTS) + source.choice(_VOWELS) for _ in range(source.choice((2, 2, 3))))
        word = "".join(syllables) + source.choice(("", "", *"nrsl"))
        found[word.upper() if capitals and source.random() < capitals else word] = None
    return list(found)


def conversations(tasks: tuple[Task, ...], count: int, seed: int, capitals: float = 0.0) -> list[ChatExample]:
    """Return chat rows that go through the tasks in turn, each with a word of its own; see ``words``."""
    return [tasks[place % len(tasks)].conversation(word) for place, word in enumerate(words(count, seed, capitals))]


TURN_ROUND = "turn words round"
"""What the model with room knows."""

NUMBERS = "numbers by heart"
"""What ``lightning-hub demo --method`` teaches it."""


def turned_words(count: int, seed: int) -> list[ChatExample]:
    """Return chat rows of the task that the model with room knows: an invented word of five letters, turned round."""
    source = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = (source.choice(_CONSONANTS) + source.choice(_VOWELS) for _ in range(2))
        found["".join(syllables) + source.choice("nrslmt")] = None
    return [Task(TURN_ROUND, "{word}", lambda word: word[::-1]).conversation(word) for word in found]


def numbers(count: int, seed: int) -> list[ChatExample]:
    """Return chat rows of facts to learn by heart: a name of three capitals, and its number of three digits."""
    source = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        name = (source.choice(_CONSONANTS) + source.choice(_VOWELS) + source.choice(_CONSONANTS)).upper()
        found.setdefault(name, "".join(source.choices("0123456789", k=3)))
    return [Task(NUMBERS, "{word}", found.__getitem__).conversation(name) for name in found]
