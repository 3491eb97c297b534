"""How a template ends the turns of an assistant: with a stop token, with a text, or with nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile


@dataclass(frozen=True)
class TurnEnd:
    """How a turn of the assistant ends.

    Attributes:
        stops: Tokens at which generation stops.
        token: The token to append if the template ends a last turn without one of them; None if none is known.
        after_call: The same for a last turn that ends with a tool call.
        text: A marker in plain text, which the template writes after each answer instead of a stop token.
        call_text: The same after tool calls.
        appends: Whether the template ends a last turn with no stop token.
    """

    stops: frozenset[int]
    token: int | None
    after_call: int | None
    text: str
    call_text: str
    appends: bool


def shared(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of tokens at the beginning that two lists have in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def shared_text(first: str, second: str) -> str:
    """The beginning that two texts have in common."""
    length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
    return first[:length]


def end_tokens(
    middle: Sequence[int], last: Sequence[int], known: frozenset[int], added: frozenset[int]
) -> frozenset[int]:
    """The end token that only the template knows: the last of the added tokens directly after a turn.

    Args:
        middle: The tokens between an answer and the header of the next question.
        last: The tokens after the last answer.
        known: Tokens at which generation stops anyway.
        added: Special tokens, and those that were added to the vocabulary.
    """
    for tokens in (middle, last):
        if any(token in known for token in tokens):
            return frozenset()
        run = list(takewhile(added.__contains__, tokens))
        if run:
            return frozenset((run[-1],))
    return frozenset()


def first_of(tokens: Sequence[int], stops: frozenset[int], otherwise: int | None) -> int | None:
    """The first token at which generation stops."""
    return next((token for token in tokens if token in stops), otherwise)
