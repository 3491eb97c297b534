"""Small tasks on invented words. They are easy to learn, easy to check, and different from each other.

A word is made of random syllables, so a model cannot know it. An answer is a function of the word, so code can check
it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

ChatExample = dict[str, list[dict[str, str]]]

METHODS = ("sft", "osft", "lora")
"""The values of ``--method``. Each one except the first has a file next to the recipe, with the options that differ."""

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
        """Return question and answer as one example of chat data."""
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
        count: Number of words.
        seed: Equal seeds give equal words.
        capitals: The share of words in capital letters.
    """
    source = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = (source.choice(_CONSONANTS) + source.choice(_VOWELS) for _ in range(source.choice((2, 2, 3))))
        word = "".join(syllables) + source.choice(("", "", *"nrsl"))
        found[word.upper() if capitals and source.random() < capitals else word] = None
    return list(found)


def conversations(tasks: tuple[Task, ...], count: int, seed: int, capitals: float = 0.0) -> list[ChatExample]:
    """Return examples that use the tasks in turn, each with a different word; see ``words``."""
    return [tasks[index % len(tasks)].conversation(word) for index, word in enumerate(words(count, seed, capitals))]


TURN_ROUND = "reverse words"
"""The task that the second embedded model knows."""

NUMBERS = "numbers"
"""The task that ``lightning-hub demo --method`` trains."""


def turned_words(count: int, seed: int) -> list[ChatExample]:
    """Return examples of the task that the second embedded model knows: an invented word of five letters, reversed."""
    source = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = (source.choice(_CONSONANTS) + source.choice(_VOWELS) for _ in range(2))
        found["".join(syllables) + source.choice("nrslmt")] = None
    return [Task(TURN_ROUND, "{word}", lambda word: word[::-1]).conversation(word) for word in found]


def numbers(count: int, seed: int) -> list[ChatExample]:
    """Return examples of facts to learn: a name of three capital letters, and its number of three digits."""
    source = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        name = (source.choice(_CONSONANTS) + source.choice(_VOWELS) + source.choice(_CONSONANTS)).upper()
        found.setdefault(name, "".join(source.choices("0123456789", k=3)))
    return [Task(NUMBERS, "{word}", found.__getitem__).conversation(name) for name in found]
