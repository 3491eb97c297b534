"""Write the option catalogue ``lightning_hub/config/schema.json`` from signatures and docstrings.

``python scripts/make_schema.py`` writes it, ``--check`` compares it with what is shipped (exit 1 when stale).
"""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import enum
import importlib
import inspect
import json
import math
import os
import re
import sys
import types
import typing
from datetime import timedelta
from pathlib import Path
from typing import cast

from docstring_parser import parse as parse_docstring

from lightning_hub.config import registry
from lightning_hub.config.bounds import bounds_of
from lightning_hub.config.schema import SCHEMA_FILE, ClassRecord, OptionRecord
from lightning_hub.config.types import parse_type
from lightning_hub.config.yaml_reader import YamlValue

_SIMPLE: dict[object, str] = {
    int: "int",
    float: "float",
    bool: "bool",
    str: "str",
    type(None): "null",
    timedelta: "duration",
    Path: "str",
    os.PathLike: "str",
}
_LISTS = (list, set, frozenset, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Set)
_MAPS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_ROLE = re.compile(r":\w+:`([^`]*)`")
_KIND_OF_BASE = {"Callback": "callback", "Logger": "logger", "Strategy": "strategy"}


class Generator:
    """Turns classes into records; nested dataclasses become records of their own."""

    def __init__(self) -> None:
        self.records: dict[str, ClassRecord] = {}

    def add(self, path: str, kind: str) -> None:
        """Import a class by its dotted name and record it."""
        module, _, name = path.rpartition(".")
        self.add_class(getattr(importlib.import_module(module), name), kind, path)

    def add_class(self, cls: type, kind: str, path: str | None = None) -> str:
        """Record a class; return its short name."""
        defined = f"{cls.__module__}.{cls.__qualname__}"
        if cls.__name__ not in self.records:
            record: ClassRecord = {"name": cls.__name__, "path": path or defined, "defined": defined, "kind": kind}
            self.records[cls.__name__] = record
            record["summary"] = summary_of(cls)
            record["options"], takes_others = self.options(cls)
            if takes_others:
                record["open"] = True
        return cls.__name__

    def options(self, cls: type) -> tuple[list[OptionRecord], bool]:
        """Return the options of a class, those of its bases behind ``**kwargs`` too, and whether any key passes."""
        found: dict[str, OptionRecord] = {}
        for owner in cls.__mro__:
            if "__init__" not in vars(owner) or owner is object:
                continue
            passes_on = False
            for parameter in list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]:
                passes_on |= parameter.kind is parameter.VAR_KEYWORD
                if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                    found.setdefault(parameter.name, self.option(cls, owner, parameter))
            if not passes_on or owner.__module__.startswith("lightning."):
                return list(found.values()), passes_on  # Lightning's own keywords go on to other libraries
        return list(found.values()), False

    def option(self, cls: type, owner: type, parameter: inspect.Parameter) -> OptionRecord:
        """Return the record of one parameter."""
        shown_as = registry.SHOWN_AS.get(owner.__name__, owner.__name__)
        key = f"{shown_as}.{parameter.name}"
        record: OptionRecord = {
            "name": parameter.name,
            "type": registry.TYPES.get(key) or self.type_line(hint_of(vars(owner)["__init__"], parameter.name)),
        }
        if key in registry.DEFAULTS:
            record["default"] = registry.DEFAULTS[key]
        elif parameter.default is parameter.empty:
            record["required"] = True
        elif is_plain(default := plain_default(parameter.default)):
            record["default"] = cast(YamlValue, default)
        bases = (registry.SHOWN_AS.get(base.__name__, base.__name__) for base in owner.__mro__)
        keys = (f"{base}.{parameter.name}" for base in bases)
        inits = [init for base in cls.__mro__ if isinstance(init := vars(base).get("__init__"), types.FunctionType)]
        hints = (hint_of(init, parameter.name) for init in inits)
        written = next((found.text for found in map(bounds_of, hints) if found is not None), None)
        if bounds := written or next((registry.RANGES[key] for key in keys if key in registry.RANGES), None):
            record["range"] = bounds
        if text := help_of(owner, parameter.name):
            record["help"] = text
        if owner is not cls and registry.SHOWN_AS.get(owner.__name__) != cls.__name__:
            record["inherited_from"] = shown_as
        parse_type(record["type"])  # the catalogue's own reader must understand it
        return record

    def type_line(self, hint: object) -> str:
        """Write a type hint in the language of the schema."""
        if hint in _SIMPLE:
            return _SIMPLE[hint]
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            return union(*(self.type_line(arg) for arg in args))
        if origin is typing.Literal:
            return union(*(choice(arg) for arg in args))
        if origin is typing.Annotated:
            return self.type_line(args[0])
        if origin is tuple and args and args[-1] is not Ellipsis:
            return f"tuple[{', '.join(self.type_line(arg) for arg in args)}]"
        if origin in _LISTS or origin is tuple:
            return f"list[{self.type_line(args[0])}]"
        if origin in _MAPS:
            return f"map[{self.type_line(args[0])}, {self.type_line(args[1])}]"
        if origin is collections.abc.Callable or hint is collections.abc.Callable:
            return "callable"
        if origin is not None and isinstance(origin, type) and issubclass(origin, os.PathLike):
            return "str"
        return self.class_line(hint)

    def class_line(self, hint: object) -> str:
        """Write a hint that is a class: words of an enum, a nested dataclass, or a kind of the catalogue."""
        if not isinstance(hint, type):
            return "object"
        if issubclass(hint, enum.Enum):
            return union(*(choice(member.value) for member in hint))
        if dataclasses.is_dataclass(hint):
            return f"settings[{self.add_class(hint, 'settings')}]"
        kinds = [_KIND_OF_BASE[base.__name__] for base in hint.__mro__ if base.__name__ in _KIND_OF_BASE]
        return f"class[{kinds[0]}]" if kinds else "object"


def hint_of(init: types.FunctionType, name: str) -> object:
    """Return the evaluated hint of a parameter; ``object`` where a library hides a type from run time."""
    probe = types.SimpleNamespace(__annotations__={name: init.__annotations__.get(name, object)})
    try:
        return typing.get_type_hints(probe, globalns=init.__globals__, include_extras=True)[name]
    except NameError:  # imported under TYPE_CHECKING only, from an extra that need not be installed
        return object


def choice(value: object) -> str:
    """Write a literal value as a type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    return f"'{value}'" if isinstance(value, str) else str(value)


def union(*lines: str) -> str:
    """Join types, each once; int stands before float, and null last.

    ``typing`` keeps one object for ``int | float`` and ``float | int``, whichever it met first, so the order that a
    library wrote is not to be had.
    """
    members = dict.fromkeys(member for line in lines for member in split_union(line))
    floats_last = "int" in members
    return " | ".join(sorted(members, key=lambda member: (member == "null", floats_last and member == "float")))


def split_union(line: str) -> list[str]:
    """Split at the bars that stand outside brackets."""
    members, depth, start = [], 0, 0
    for index, char in enumerate(line):
        depth += (char == "[") - (char == "]")
        if char == "|" and not depth:
            members.append(line[start:index].strip())
            start = index + 1
    return [*members, line[start:].strip()]


def plain_default(value: object) -> object:
    """Turn tuples into lists and enum members into their words."""
    if isinstance(value, tuple | list):
        return [plain_default(item) for item in value]
    return value.value if isinstance(value, enum.Enum) else value


def is_plain(value: object) -> bool:
    """Say whether JSON can hold a value."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | str)


def summary_of(cls: type) -> str:
    """Return the first sentence of a class's docstring, or of its ``__init__``'s."""
    for text in (cls.__doc__, cls.__init__.__doc__):  # type: ignore[misc]  # the very __init__ of this class is meant
        if summary := parse_docstring(inspect.cleandoc(text or "")).short_description:
            return readable(summary)
    return ""


def readable(text: str) -> str:
    """Return a docstring's text on one line, without the marks of reStructuredText."""
    named = _ROLE.sub(lambda match: match[1].lstrip("~").rpartition(".")[2] or match[1], text)
    return " ".join(named.replace("``", "").split())


def help_of(owner: type, name: str) -> str:
    """Return what a class's docstring, or its ``__init__``'s, says about a parameter, on one line."""
    for text in (vars(owner)["__init__"].__doc__, owner.__doc__):
        for param in parse_docstring(inspect.cleandoc(text or "")).params:
            if param.arg_name == name and param.description:
                return readable(param.description)
    return ""


def generate() -> str:
    """Return the text of ``schema.json``.

    Raises:
        ImportError: A class of the registry is missing.
    """
    generator = Generator()
    for path, kind in registry.CLASSES.items():
        generator.add(path, kind)
    records = list(generator.records.values())
    return json.dumps({"schema": 1, "classes": records}, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    """Write or compare the schema; return the exit code."""
    parser = argparse.ArgumentParser(description="Write the option catalogue from signatures and docstrings.")
    parser.add_argument("--check", action="store_true", help="compare with the shipped file, write nothing")
    fresh, check = generate(), parser.parse_args().check
    if not check:
        SCHEMA_FILE.write_text(fresh, encoding="utf-8")
    elif fresh != SCHEMA_FILE.read_text(encoding="utf-8"):
        sys.stderr.write(f"{SCHEMA_FILE} is stale: run python scripts/make_schema.py\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
