"""The option catalogue as JSON Schema (draft 2020-12), so that editors complete and check recipes.

A recipe can consist of several files, so no section is required in one file. A class that is not in the catalogue may
have any options; the parser checks them.
"""

from __future__ import annotations

from typing import Any

from lightning_hub.config.bounds import Bounds
from lightning_hub.config.schema import SECTIONS, ClassInfo, Option, Schema
from lightning_hub.config.types import OptionType

DRAFT = "https://json-schema.org/draft/2020-12/schema"

_SIMPLE: dict[str, Any] = {
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "str": {"type": "string"},
    "null": {"type": "null"},
    "duration": {"type": ["string", "object"]},
    "callable": False,  # no value is valid
    "object": False,
}
CLASS_KINDS = ("model", "data", "callback", "logger", "strategy")
"""Kinds of classes that a recipe names."""

_KEYWORDS = {">=": "minimum", "<=": "maximum", ">": "exclusiveMinimum", "<": "exclusiveMaximum"}
_REFERENCE = {"type": "string", "pattern": r"^\$\{env:\w+\}$"}
"""The form of a value that is read from an environment variable. Every option accepts it."""


def json_schema(schema: Schema) -> dict[str, Any]:
    """Return the JSON Schema of recipes.

    Args:
        schema: The catalogue.
    """
    sections = {name: _section(schema, name) for name in SECTIONS}
    return {
        "$schema": DRAFT,
        "title": "Lightning Hub recipe",
        "type": "object",
        "properties": sections,
        "additionalProperties": False,
        "$defs": {
            **{info.name: _options(info) for info in schema.classes},
            **{f"any_{kind}": _class_of(schema, kind) for kind in CLASS_KINDS},
        },
    }


def _section(schema: Schema, name: str) -> dict[str, Any]:
    if name == "seed_everything":
        return {"type": ["integer", "boolean"]}
    if name in ("model", "data"):
        return _reference(f"any_{name}")
    info = schema.section(name)
    assert info is not None, f"the catalogue has a class for {name}"
    return _reference(info.name)


def _options(info: ClassInfo) -> dict[str, Any]:
    """Return the schema of a mapping of a class's options."""
    found: dict[str, Any] = {"type": "object", "properties": {o.name: _option(o) for o in info.options.values()}}
    if info.summary:
        found["description"] = info.summary
    if not info.takes_other_keys:
        found["additionalProperties"] = False
    return found


def _option(option: Option) -> dict[str, Any]:
    members = [_type(member, option.range) for member in option.type.members()]
    found: dict[str, Any] = {"anyOf": [*members, _REFERENCE]}
    if option.help:
        found["description"] = option.help
    if option.has_default and not option.required:
        found["default"] = option.default
    return found


def _type(kind: OptionType, bounds: str = "") -> Any:
    if kind.head == "union":
        return {"anyOf": [_type(member, bounds) for member in kind.args]}
    if kind.head == "choice":
        return {"const": kind.word}
    if kind.head == "list":
        return {"type": "array", "items": _type(kind.args[0])}
    if kind.head == "tuple":
        parts = [_type(part) for part in kind.args]
        return {"type": "array", "prefixItems": parts, "minItems": len(parts), "maxItems": len(parts)}
    if kind.head == "map":
        return {"type": "object", "additionalProperties": _type(kind.args[1])}
    if kind.head == "settings":
        return _reference(str(kind.word))
    if kind.head == "class":
        return _reference(f"any_{kind.word}")
    found = _SIMPLE[kind.head]
    if kind.head in ("int", "float") and bounds:
        return found | {_KEYWORDS[sign]: limit for sign, limit in Bounds(bounds).limits()}
    return found


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/$defs/{name}"}


def _class_of(schema: Schema, kind: str) -> dict[str, Any]:
    """Return the schema of a class: a name, or ``class_path`` with ``init_args``."""
    known = schema.of_kind(kind)
    names: dict[str, Any] = {"anyOf": [{"enum": [info.name for info in known]}, {"type": "string", "pattern": r"\."}]}
    mapping = {
        "type": "object",
        "properties": {"class_path": names, "init_args": {"type": "object"}, "dict_kwargs": {"type": "object"}},
        "additionalProperties": False,
        "allOf": [
            {
                "if": {
                    "properties": {"class_path": {"enum": sorted({info.name, info.path, info.defined})}},
                    "required": ["class_path"],
                },
                "then": {"properties": {"init_args": _reference(info.name)}},
            }
            for info in known
        ],
    }
    return {"anyOf": [names, mapping]}
