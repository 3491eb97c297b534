"""The option catalogue: every shipped class with its options, read from ``schema.json`` without an import of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TypedDict

from lightning_hub.config.types import OptionType, parse_type
from lightning_hub.config.yaml_reader import YamlValue

SCHEMA_FILE = Path(__file__).with_name("schema.json")

SECTIONS = ("seed_everything", "trainer", "model", "data", "checkpoint")
"""The top-level keys of a recipe, in the order in which they are written."""


class OptionRecord(TypedDict, total=False):
    """An option as it is written in ``schema.json``; ``default`` is absent if JSON cannot represent it."""

    name: str
    type: str
    required: bool
    default: YamlValue
    range: str
    help: str
    inherited_from: str


class ClassRecord(TypedDict, total=False):
    """A class as it is written in ``schema.json``."""

    name: str
    path: str
    defined: str
    kind: str
    summary: str
    open: bool
    options: list[OptionRecord]


@dataclass(frozen=True)
class Option:
    """One option of a class.

    Attributes:
        name: The key in a recipe.
        type_text: Its type in the schema's language.
        required: Whether a recipe must give it.
        default: The value when it is not given.
        has_default: False for a required option and for a default that JSON cannot represent.
        range: Bounds such as ``"> 0, <= 1"``, or empty.
        help: What it does, from the docstring.
        inherited_from: Name of the class that declares it, or empty.
    """

    name: str
    type_text: str
    required: bool = False
    default: YamlValue = None
    has_default: bool = True
    range: str = ""
    help: str = ""
    inherited_from: str = ""

    @property
    def type(self) -> OptionType:
        """The parsed type."""
        return parse_type(self.type_text)

    @classmethod
    def from_record(cls, record: OptionRecord) -> Option:
        """Read an option of ``schema.json``."""
        return cls(
            name=record["name"],
            type_text=record["type"],
            required=record.get("required", False),
            default=record.get("default"),
            has_default="default" in record,
            range=record.get("range", ""),
            help=record.get("help", ""),
            inherited_from=record.get("inherited_from", ""),
        )


@dataclass(frozen=True)
class ClassInfo:
    """One class of the catalogue.

    Attributes:
        name: Short name, as a recipe gives it.
        path: Public class path.
        defined: Class path where it is defined; a recipe may use it too.
        kind: model, data, callback, logger, strategy, trainer, checkpoint or settings (a nested mapping).
        summary: First sentence of its docstring.
        options: Its options by name, in the order of the signature.
        takes_other_keys: Whether it accepts other keys too (``**kwargs`` of a logger).
    """

    name: str
    path: str
    defined: str
    kind: str
    summary: str
    options: dict[str, Option] = field(default_factory=dict)
    takes_other_keys: bool = False

    @classmethod
    def from_record(cls, record: ClassRecord) -> ClassInfo:
        """Read a class of ``schema.json``."""
        return cls(
            name=record["name"],
            path=record["path"],
            defined=record["defined"],
            kind=record["kind"],
            summary=record.get("summary", ""),
            options={option["name"]: Option.from_record(option) for option in record["options"]},
            takes_other_keys=record.get("open", False),
        )


@dataclass(frozen=True)
class Schema:
    """All classes of the catalogue."""

    classes: tuple[ClassInfo, ...]

    @classmethod
    def from_records(cls, records: Iterable[ClassRecord]) -> Schema:
        """Build a catalogue from the records of ``schema.json``."""
        return cls(tuple(ClassInfo.from_record(record) for record in records))

    @cached_property
    def _by_name(self) -> dict[str, ClassInfo]:
        named = {info.name: info for info in self.classes}
        return named | {info.defined: info for info in self.classes} | {info.path: info for info in self.classes}

    def find(self, name: str) -> ClassInfo | None:
        """Return the class with this short name or class path, or None."""
        return self._by_name.get(name)

    def of_kind(self, kind: str) -> list[ClassInfo]:
        """Return the classes of one kind."""
        return [info for info in self.classes if info.kind == kind]

    def section(self, name: str, class_name: str | None = None) -> ClassInfo | None:
        """Return the class that a section configures; for ``model`` and ``data`` the class with the given name."""
        if name in ("model", "data"):
            return self.find(class_name) if class_name else None
        return next(iter(self.of_kind(name)), None)

    def settings_of(self, option: Option | None) -> ClassInfo | None:
        """Return the class behind an option that is a mapping of further options (``settings[Best]``)."""
        for member in option.type.members() if option is not None else ():
            if member.head == "settings":
                return self.find(str(member.word))
        return None


@cache
def shipped_schema() -> Schema:
    """Return the catalogue that ships with the package."""
    with SCHEMA_FILE.open(encoding="utf-8") as file:
        return Schema.from_records(json.load(file)["classes"])
