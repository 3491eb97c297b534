"""Read YAML text into a tree of nodes in which every key has its file, line and column.

The reader accepts less than YAML allows: one document, string keys, no tags, no duplicate keys. There are limits for
the size, the depth, the number of values and the number of values after alias expansion, so that a malicious file
cannot take more than seconds. Plain scalars follow the YAML 1.2 core schema (``1e-5`` is a float, ``on`` is text).
"""

from __future__ import annotations

import os
import re
import select
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from lightning_hub.errors import ConfigError

MAX_RECIPE_BYTES = 250_000
_PIPE_LIMIT = 5.0
"""Seconds in which a pipe that is given as a file must have data."""
MAX_DEPTH = 64
MAX_NODES = 20_000

YamlValue: TypeAlias = "bool | int | float | str | list[YamlValue] | dict[str, YamlValue] | None"
"""A value of YAML or JSON; a recipe consists of such values."""

KeyPath: TypeAlias = "tuple[str | int, ...]"

_INT = re.compile(r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, bool | float | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", "+.inf", ".Inf", "+.Inf", ".INF", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


@dataclass(frozen=True)
class SourcePosition:
    """The position of a value: a file with its line, or a flag of the command line."""

    source: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class YamlNode:
    """One value of a recipe with the position of its key.

    Attributes:
        value: A scalar, a list of nodes or a mapping of nodes.
        place: The position of the key or of the list item.
        text: The scalar as it was written, for options that take text.
        size: Number of nodes in this subtree, with aliases expanded.
    """

    value: bool | int | float | str | list[YamlNode] | dict[str, YamlNode] | None
    place: SourcePosition
    text: str | None = None
    size: int = field(default=1, compare=False)

    @classmethod
    def collection(cls, value: list[YamlNode] | dict[str, YamlNode], place: SourcePosition) -> YamlNode:
        """Return a list or mapping node with its expanded size."""
        children = value if isinstance(value, list) else value.values()
        return cls(value, place, size=1 + sum(child.size for child in children))

    def plain(self) -> YamlValue:
        """Return the value without positions."""
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        return self.value

    def places(self, prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, SourcePosition]]:
        """Yield the key path and the position of this node and of all nodes below it."""
        yield prefix, self.place
        children = enumerate(self.value) if isinstance(self.value, list) else ()
        named = self.value.items() if isinstance(self.value, dict) else ()
        for key, child in (*children, *named):
            yield from child.places((*prefix, key))


def scalar(text: str) -> bool | int | float | str | None:
    """Read a plain scalar by the YAML 1.2 core schema (digits can be grouped with ``_``)."""
    if text in _WORDS:
        return _WORDS[text]
    try:
        if _INT.fullmatch(text):
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        if _FLOAT.fullmatch(text):
            return float(text)
    except ValueError:  # "1__0", or more digits than Python converts to a number: it is text
        return text
    return text


class _Composer:
    """Builds nodes from the events of one document."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.anchors: dict[str, YamlNode] = {}
        self.num_nodes = 0

    def place(self, event: Event) -> SourcePosition:
        mark = event.start_mark
        return SourcePosition(self.source, mark.line + 1, mark.column + 1)

    def refuse(self, event: Event, message: str, remedy: str | None = None) -> ConfigError:
        return ConfigError(message, where=str(self.place(event)), remedy=remedy)

    def node(self, event: Event, events: Iterator[Event], place: SourcePosition, depth: int) -> YamlNode:
        if isinstance(event, AliasEvent):
            if event.anchor not in self.anchors:
                raise self.refuse(
                    event,
                    f"the alias *{event.anchor} has no anchor before it",
                    f"write &{event.anchor} at an earlier value",
                )
            known = self.anchors[event.anchor]
            return YamlNode(known.value, place, known.text, known.size)
        assert isinstance(event, NodeEvent), f"unexpected YAML event {event}"
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise self.refuse(event, f"more than {MAX_NODES} values: not a recipe")
        if depth > MAX_DEPTH:
            raise self.refuse(event, f"nested deeper than {MAX_DEPTH} levels")
        tag = getattr(event, "tag", None)  # scalars and collections have one, in classes without a common base
        if tag is not None and tag != "!":
            raise self.refuse(event, f"the tag {tag} is not allowed: a recipe has plain values only", "remove the tag")
        built = self.collect(event, events, place, depth)
        if built.size > MAX_NODES:
            raise self.refuse(event, f"more than {MAX_NODES} values once aliases are expanded")
        if event.anchor:
            self.anchors[event.anchor] = built
        return built

    def collect(self, event: Event, events: Iterator[Event], place: SourcePosition, depth: int) -> YamlNode:
        if isinstance(event, ScalarEvent):
            value = scalar(event.value) if event.implicit[0] else event.value
            return YamlNode(value, place, event.value)
        if isinstance(event, SequenceStartEvent):
            return YamlNode.collection(self.items(events, depth), place)
        assert isinstance(event, MappingStartEvent), f"unexpected YAML event {event}"
        return YamlNode.collection(self.mapping(events, depth), place)

    def items(self, events: Iterator[Event], depth: int) -> list[YamlNode]:
        found = []
        while not isinstance(event := next(events), SequenceEndEvent):
            found.append(self.node(event, events, self.place(event), depth + 1))
        return found

    def mapping(self, events: Iterator[Event], depth: int) -> dict[str, YamlNode]:
        found: dict[str, YamlNode] = {}
        merged: dict[str, YamlNode] = {}
        while not isinstance(event := next(events), MappingEndEvent):
            if not isinstance(event, ScalarEvent):
                raise self.refuse(event, "a key must be a plain word")
            child = self.node(next(events), events, self.place(event), depth + 1)
            if event.value == "<<" and event.implicit[0]:
                merged = self.merge_key(event, child) | merged
            elif event.value in found:
                first = found[event.value].place.line
                raise self.refuse(event, f"the key {event.value!r} is given twice (first on line {first})", "keep one")
            else:
                found[event.value] = child
        return merged | found

    def merge_key(self, event: Event, child: YamlNode) -> dict[str, YamlNode]:
        parts = child.value if isinstance(child.value, list) else [child]
        merged: dict[str, YamlNode] = {}
        for part in parts:
            if not isinstance(part.value, dict):
                raise self.refuse(event, "<< takes a mapping or a list of mappings")
            merged = part.value | merged
        return merged


def parse_yaml(text: str, source: str) -> YamlNode:
    """Read one YAML document.

    Args:
        text: The document.
        source: Its name in messages: a file name or a flag.

    Raises:
        ConfigError: Not YAML, or YAML that is not allowed in a recipe; ``where`` has file and line.
    """
    if len(text) > MAX_RECIPE_BYTES:
        raise ConfigError(f"larger than {MAX_RECIPE_BYTES:,} bytes: not a recipe", where=source)
    composer = _Composer(source)
    try:
        return _document(composer, iter(YAML(typ="safe", pure=True).parse(text)))
    except MarkedYAMLError as error:
        raise _syntax_error(error, source) from None
    except YAMLError as error:
        raise _character_error(error, text, source) from None


def _document(composer: _Composer, events: Iterator[Event]) -> YamlNode:
    root = YamlNode({}, SourcePosition(composer.source, 1, 1))
    documents = 0
    for event in events:
        if isinstance(event, DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise composer.refuse(event, "a second document starts here", "give one recipe per file")
        elif isinstance(event, ScalarEvent | AliasEvent | SequenceStartEvent | MappingStartEvent):
            root = composer.node(event, events, composer.place(event), 0)
    return root


def _syntax_error(error: MarkedYAMLError, source: str) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    problem = str(error.problem or error.context or "not valid YAML")
    where = f"{source}:{mark.line + 1}" if mark else source
    if "'\\t'" in problem or "tab" in problem:
        return ConfigError("there is a tab where YAML needs spaces", where=where, remedy="indent with spaces")
    return ConfigError(f"not valid YAML: {problem}", where=where)


def _character_error(error: YAMLError, text: str, source: str) -> ConfigError:
    position = getattr(error, "position", None)
    line = text.count("\n", 0, position) + 1 if isinstance(position, int) else 1
    return ConfigError("a control character that YAML does not allow", where=f"{source}:{line}")


def read_file(path: str | Path) -> tuple[YamlNode, str]:
    """Read a recipe file; return its node and its unchanged text.

    Raises:
        ConfigError: The file cannot be read, is not UTF-8, is not YAML or is not a mapping.
    """
    source = str(path)
    text = _decode(_bytes(Path(path), source), source)
    node = parse_yaml(text, source)
    if node.value is None:
        return YamlNode({}, node.place), text
    if not isinstance(node.value, dict):
        kind = "a list" if isinstance(node.value, list) else f"the single value {node.text!r:.60}"
        raise ConfigError(
            f"contains {kind}, not a mapping", where=str(node.place), remedy="start with trainer:, model: or data:"
        )
    return node, text


def _bytes(path: Path, source: str) -> bytes:
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode) and not select.select([file], [], [], _PIPE_LIMIT)[0]:
                raise ConfigError("is a pipe without a writer", where=source, remedy="give a file")
            os.set_blocking(file.fileno(), True)
            return file.read(MAX_RECIPE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError("no such file", where=source, remedy="check the path given to --config") from None
    except IsADirectoryError:
        raise ConfigError("is a folder, not a file", where=source, remedy="give the YAML file inside it") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=source) from None


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a named pipe is opened at once, even if it has no writer


def _decode(data: bytes, source: str) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError("is UTF-16 (its byte order mark says so)", where=f"{source}:1", remedy="save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError("is not UTF-8", where=f"{source}:{line}", remedy="save it as UTF-8") from None
