"""The small type language of the option schema.

Each type is one readable line, in ``schema.json`` and in messages::

    int   float   bool   str   null   duration   'mean' | 'sum'   int | null
    list[int]   tuple[float, float]   map[str, float]
    class[callback]   settings[Best]   callable   object

``class[kind]`` is a class of the schema written as a short name or as ``class_path`` with ``init_args``;
``settings[Name]`` is a mapping of that class's options; ``duration`` is ``DD:HH:MM:SS`` or a mapping of units;
``callable`` and ``object`` cannot be written in a recipe.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache

from lightning_hub.config.yaml_reader import YamlValue, scalar

_TOKENS = re.compile(r"\s*('[^']*'|-?[0-9.]+(?:e-?[0-9]+)?|[A-Za-z_][\w.]*|[\[\],|])")
_DURATION = re.compile(r"\d+:\d{1,2}:\d{1,2}:\d{1,2}")
_CLASS_NAME = re.compile(r"[A-Z]\w*|\w+(\.\w+)+")
_DURATION_UNITS = {"weeks", "days", "hours", "minutes", "seconds", "milliseconds", "microseconds"}
_ATOMS = {"int", "float", "bool", "str", "null", "duration", "callable", "object"}
_ARTICLES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "null": "null",
    "duration": "a time as DD:HH:MM:SS",
    "callable": "a Python function",
    "object": "a Python object",
}


@dataclass(frozen=True)
class OptionType:
    """A type of the schema: its ``head`` (``int``, ``list``, ``choice`` ...) and its arguments."""

    head: str
    args: tuple[OptionType, ...] = ()
    word: str | int | float = ""

    def members(self) -> tuple[OptionType, ...]:
        """Return the alternatives of a union, or the type alone."""
        return self.args if self.head == "union" else (self,)

    def choices(self) -> list[str]:
        """Return the literal values that the type allows."""
        return [str(member.word) for member in self.members() if member.head == "choice"]

    def kinds(self) -> set[str]:
        """Return the kinds of classes that the type accepts, in a list or alone."""
        inner = {kind for arg in self.args for kind in arg.kinds()}
        return inner | {str(self.word)} if self.head == "class" else inner

    def accepts(self, value: YamlValue) -> bool:
        """Return whether the value has this type. The names of classes are checked elsewhere."""
        if self.head == "union":
            return any(member.accepts(value) for member in self.args)
        if self.head == "choice":
            return type(value) is type(self.word) and value == self.word
        if self.head in ("list", "tuple"):
            return isinstance(value, list) and self._accepts_items(value)
        if self.head == "map":
            key, item = self.args
            return isinstance(value, dict) and all(
                (key.accepts(name) or key.accepts(scalar(name))) and item.accepts(child)
                for name, child in value.items()
            )
        return _accepts_atom(self.head, value)

    def _accepts_items(self, value: list[YamlValue]) -> bool:
        if self.head == "list":
            return all(self.args[0].accepts(item) for item in value)
        return len(value) == len(self.args) and all(arg.accepts(v) for arg, v in zip(self.args, value, strict=True))

    def names_only_a_class(self, value: YamlValue) -> bool:
        """Return whether a text must be a class name: no other alternative of the type accepts it."""
        accepting = [member.head for member in self.members() if isinstance(value, str) and member.accepts(value)]
        return accepting == ["class"]

    def describe(self) -> str:
        """Return the type in words for a message."""
        if self.head == "union":
            return _listed([member.describe() for member in self.args])
        if self.head == "choice":
            return str(self.word)
        if self.head == "list":
            return f"a list (each {self.args[0].describe()})"
        if self.head == "tuple":
            return f"a list of {len(self.args)} ({', '.join(arg.describe() for arg in self.args)})"
        if self.head == "map":
            return f"a mapping to {self.args[1].describe()}"
        if self.head == "class":
            return f"a {self.word} class"
        return "a mapping of options" if self.head == "settings" else _ARTICLES[self.head]


def _accepts_atom(head: str, value: YamlValue) -> bool:
    number = isinstance(value, int) and not isinstance(value, bool)
    if head == "duration":
        return (isinstance(value, str) and _DURATION.fullmatch(value) is not None) or (
            isinstance(value, dict) and set(value) <= _DURATION_UNITS
        )
    if head == "class":
        return isinstance(value, dict) or (isinstance(value, str) and _CLASS_NAME.fullmatch(value) is not None)
    simple = {
        "null": value is None,
        "bool": isinstance(value, bool),
        "int": number,
        "float": number or isinstance(value, float),
        "str": isinstance(value, str),
        "settings": isinstance(value, dict),
    }
    return simple.get(head, False)


def _listed(words: list[str]) -> str:
    unique = list(dict.fromkeys(words))
    return unique[0] if len(unique) == 1 else f"{', '.join(unique[:-1])} or {unique[-1]}"


@lru_cache(maxsize=1024)
def parse_type(text: str) -> OptionType:
    """Parse a line of the type language.

    Raises:
        ValueError: The line is not a type; this is a fault of the schema, not of the user.
    """
    tokens = _TOKENS.findall(text)
    if "".join(tokens).replace(" ", "") != text.replace(" ", ""):
        raise ValueError(f"not a type of the schema: {text!r}")
    parsed, rest = _union(tokens)
    if rest:
        raise ValueError(f"not a type of the schema: {text!r} (left over: {' '.join(rest)})")
    return parsed


def _union(tokens: list[str]) -> tuple[OptionType, list[str]]:
    first, rest = _item(tokens)
    members = [first]
    while rest and rest[0] == "|":
        member, rest = _item(rest[1:])
        members.append(member)
    return (first if len(members) == 1 else OptionType("union", tuple(members))), rest


def _item(tokens: list[str]) -> tuple[OptionType, list[str]]:
    if not tokens:
        raise ValueError("not a type of the schema: it ends too early")
    head, rest = tokens[0], tokens[1:]
    if head.startswith("'"):
        return OptionType("choice", word=head[1:-1]), rest
    if head[0].isdigit() or head[0] == "-":
        return OptionType("choice", word=json.loads(head)), rest
    if head in ("class", "settings") and rest[:1] == ["["] and rest[2:3] == ["]"]:
        return OptionType(head, word=rest[1]), rest[3:]
    if head in ("list", "tuple", "map") and rest[:1] == ["["]:
        args, rest = _arguments(rest[1:])
        return OptionType(head, args), rest
    if head not in _ATOMS:
        raise ValueError(f"not a type of the schema: {head!r}")
    return OptionType(head), rest


def _arguments(tokens: list[str]) -> tuple[tuple[OptionType, ...], list[str]]:
    found = []
    while True:
        arg, tokens = _union(tokens)
        found.append(arg)
        if not tokens or tokens[0] not in ",]":
            raise ValueError("not a type of the schema: a bracket is not closed")
        closing, tokens = tokens[0], tokens[1:]
        if closing == "]":
            return tuple(found), tokens
