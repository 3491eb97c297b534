"""How large and how deep one example may be, so that no file can use up the memory or the stack of a run."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")

MAX_VALUES = 2_000_000
"""Texts, lists and objects of one example: each costs far more memory than its few bytes in the file."""

_STRUCTURE = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)


class TooLargeError(ValueError):
    """An example is beyond the limits; the message says which one."""


@dataclass(frozen=True)
class ExampleLimits:
    """Bounds of one example.

    Attributes:
        max_bytes: Bytes of a line, an example, a cell or a text document, decompressed.
        max_depth: Levels of lists and objects inside each other.
    """

    max_bytes: int = 64_000_000
    max_depth: int = 1_000

    @property
    def too_large(self) -> str:
        """The message for an example over ``max_bytes``."""
        return f"larger than {self.max_bytes / 1e6:g} MB (data.init_args.max_example_mb)"

    @property
    def too_deep(self) -> str:
        """The message for an example over ``max_depth``."""
        return f"nested deeper than {self.max_depth:,} levels (data.init_args.max_example_depth)"

    def is_too_large(self, data: object) -> bool:
        """Whether the texts of an example in memory are larger than ``max_bytes``."""
        return sum(map(len, texts_inside(data))) > self.max_bytes

    def loads(self, text: str) -> object:
        """Parse one JSON text within the limits.

        Raises:
            TooLargeError: It is beyond them.
            ValueError: It is not JSON.
        """
        self.check(text)
        return self.with_stack(json.loads, text)

    def with_stack(self, parse: Callable[[str], _T], text: str) -> _T:
        """Parse with room for ``max_depth`` levels, however deep the caller is.

        Raises:
            TooLargeError: The text is deeper.
        """
        try:
            return parse(text)
        except RecursionError:
            before = sys.getrecursionlimit()
        sys.setrecursionlimit(before + self.max_depth)
        try:
            return parse(text)
        except RecursionError as error:
            raise TooLargeError(self.too_deep) from error
        finally:
            sys.setrecursionlimit(before)

    def check(self, text: str) -> None:
        """Refuse a JSON text that is deeper or has more values than allowed.

        Brackets are counted first, which is fast; only a text with many of them is examined bracket by bracket.

        Raises:
            TooLargeError: It is beyond the limits.
        """
        brackets = text.count("[") + text.count("{")
        if brackets > self.max_depth or brackets + text.count('"') // 2 > MAX_VALUES:
            self.check_exactly(text)

    def check_exactly(self, text: str, position: int = 0) -> None:
        """Look at every bracket and text of the JSON value that begins at a position.

        Raises:
            TooLargeError: It is beyond the limits.
        """
        depth = 0
        for count, found in enumerate(_STRUCTURE.finditer(text, position), 1):
            if text[found.start()] in "[{":
                depth += 1
                if depth > self.max_depth:
                    raise TooLargeError(self.too_deep)
            elif text[found.start()] in "]}":
                depth -= 1
            if count > 2 * MAX_VALUES:
                raise TooLargeError(f"more than {MAX_VALUES:,} texts, lists and objects in one example")
            if depth <= 0:
                return


def texts_inside(value: object) -> Iterator[str]:
    """All texts of a JSON value, keys too, without recursion."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, str):
            yield found
        elif isinstance(found, dict):
            yield from found
            waiting.extend(found.values())
        elif isinstance(found, list | tuple):
            waiting.extend(found)
