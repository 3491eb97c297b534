"""Checks the Python names in a recipe before anything is imported.

A ``class_path`` must begin with an allowed prefix, *and* the class must be defined under an allowed prefix. To find the
definition, the source files are read and never executed. So a recipe cannot reach a module that a library imports
(``lightning.pytorch.cli.os.system``). In all other options a value that names something importable (``os.system`` as
an argument of a callback) is refused, because the parser would import it.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import ModuleSpec
from pathlib import Path

from lightning_hub.config.recipe import Recipe, keyed_fault
from lightning_hub.config.schema import Option, Schema
from lightning_hub.config.yaml_reader import KeyPath, YamlValue
from lightning_hub.errors import ConfigError

ALLOWED_PREFIXES = ("lightning_hub", "lightning.pytorch", "torch.optim", "torch.utils.data")
"""Packages whose classes a recipe may name; ``--allow-class`` adds more."""

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_CLASS_KEYS = ("class_path", "_target_", "__class__", "__base__")
_MAX_HOPS = 8


@dataclass(frozen=True)
class AllowList:
    """The prefixes under which a class may be defined; a prefix matches complete parts of a dotted name."""

    prefixes: tuple[str, ...] = ALLOWED_PREFIXES

    @classmethod
    def with_more(cls, prefixes: Iterable[str]) -> AllowList:
        """Return the standard list and the prefixes of ``--allow-class``.

        Raises:
            ConfigError: A prefix is not a dotted name.
        """
        given = tuple(prefix.removesuffix(".*").removesuffix(".") for prefix in prefixes)
        for prefix in given:
            if not all(part.isidentifier() for part in prefix.split(".")):
                raise ConfigError(f"{prefix!r} is not a package name", where="--allow-class", remedy="write my_package")
        return cls((*ALLOWED_PREFIXES, *given))

    def covers(self, name: str) -> bool:
        """Return whether the dotted name is one of the prefixes or begins with one."""
        return any(name == prefix or name.startswith(prefix + ".") for prefix in self.prefixes)

    def holds_class(self, name: str) -> bool:
        """Return whether the dotted name is a class that is defined under an allowed prefix."""
        return self.covers(name) and _defines_class(name, self)


def check_names(recipe: Recipe, schema: Schema, allowed: AllowList) -> Iterator[ConfigError]:
    """Yield one fault for each name that is not allowed in a recipe."""
    for path, value, option in _values(recipe.tree, schema):
        if not isinstance(value, str):
            continue
        if path[-1] in _CLASS_KEYS:
            fault = _class_fault(value, schema, allowed)
        elif option is not None and not _is_imported(option):
            fault = None
        else:
            fault = _callable_fault(value, schema, allowed)
        if fault:
            yield keyed_fault(recipe, path, *fault)


def _class_fault(name: str, schema: Schema, allowed: AllowList) -> tuple[str, str] | None:
    """Return the fault of a class path; short names are checked against the catalogue elsewhere."""
    if schema.find(name) is not None or re.fullmatch(r"[A-Za-z_]\w*", name):
        return None
    if not _DOTTED.fullmatch(name):
        return f"{name!r:.80} is not a class path", "write a short name or package.module.Class"
    if not allowed.covers(name):
        return (
            f"{name} is outside the packages that a recipe may use ({', '.join(allowed.prefixes)})",
            f"if you trust it, give --allow-class {name.rpartition('.')[0]}",
        )
    if not _defines_class(name, allowed):
        return f"{name} is not a class of that package", "give the module that defines the class"
    return None


def _callable_fault(value: str, schema: Schema, allowed: AllowList) -> tuple[str, str] | None:
    """Return the fault of a value whose option takes a class or is not in the catalogue."""
    if schema.find(value) is not None or not _DOTTED.fullmatch(value) or not _is_importable(value):
        return None
    if allowed.holds_class(value):
        return None
    return (
        f"{value} names something that Python would import",
        "use plain values and classes of allowed packages (--allow-class adds a package)",
    )


def _is_imported(option: Option) -> bool:
    """Return whether the parser would import a text that is given to this option."""
    text = option.type_text
    return any(word in text for word in ("class[", "callable", "object"))


def _values(tree: YamlValue, schema: Schema) -> Iterator[tuple[KeyPath, YamlValue, Option | None]]:
    """Yield every scalar of the recipe with its path and its option (None if it is not in the catalogue)."""
    if not isinstance(tree, dict):
        return
    for section, value in tree.items():
        chosen = value.get("class_path") if isinstance(value, dict) else None
        info = schema.section(section, str(chosen) if chosen else None) if isinstance(section, str) else None
        options = info.options if info else {}
        yield from _below(value, (section,), options, None, schema)


def _below(
    value: YamlValue, path: KeyPath, options: dict[str, Option], option: Option | None, schema: Schema
) -> Iterator[tuple[KeyPath, YamlValue, Option | None]]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _below(item, (*path, index), {}, option, schema)
    elif isinstance(value, dict):
        named = schema.find(str(value["class_path"])) if "class_path" in value else None
        inside = named.options if named else {} if "class_path" in value else options
        for key, child in value.items():
            known = None if key == "init_args" else inside.get(key, option if not inside else None)
            yield from _below(child, (*path, key), inside if key == "init_args" else {}, known, schema)
    else:
        yield path, value, option


def _is_importable(name: str) -> bool:
    """Return whether the first part of a dotted name is a module that Python would find from this folder."""
    top, _, rest = name.partition(".")
    if top in sys.stdlib_module_names or top in sys.builtin_module_names or top == "builtins":
        return True
    here = Path.cwd()
    if (here / f"{top}.py").exists() or (here / top / "__init__.py").exists():
        return True
    spec = _spec(top, None)
    if spec is None:
        return False
    if spec.origin is not None:
        return True
    second = rest.partition(".")[0]  # a folder without __init__: a package only if the next name is found in it
    return any((Path(folder) / f"{second}.py").exists() for folder in spec.submodule_search_locations or ())


def _defines_class(name: str, allowed: AllowList, hops: int = 0) -> bool:
    """Return whether a dotted name is a ``class`` statement under an allowed prefix; imports are followed."""
    if hops > _MAX_HOPS or not allowed.covers(name):
        return False
    module, _, attribute = name.rpartition(".")
    file = _module_file(module)
    if file is None:
        return False
    classes, imports = _names_of(file)
    if attribute in classes:
        return True
    target = imports.get(attribute)
    return target is not None and _defines_class(_absolute(target, module, file), allowed, hops + 1)


def _absolute(target: str, module: str, file: Path) -> str:
    """Resolve a relative import (``..callback.Callback``) seen in a module."""
    dots = len(target) - len(target.lstrip("."))
    if not dots:
        return target
    parts = module.split(".")
    package = parts if file.name == "__init__.py" else parts[:-1]
    return ".".join([*package[: len(package) - dots + 1], target[dots:]])


@lru_cache(maxsize=256)
def _module_file(module: str) -> Path | None:
    """Return the source file of a module without importing it or its parents."""
    search: list[str] | None = None
    origin: str | None = None
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        spec = _spec(".".join(parts[:end]), search)
        if spec is None:
            return None
        origin = spec.origin
        search = list(spec.submodule_search_locations or ())
    return Path(origin) if origin and origin.endswith(".py") else None


def _spec(name: str, search: list[str] | None) -> ModuleSpec | None:
    """Return the spec of a module from the import finders. ``importlib.util.find_spec`` would import its parents."""
    for finder in sys.meta_path:
        spec = finder.find_spec(name, search)
        if spec is not None:
            return spec
    return None


@lru_cache(maxsize=256)
def _names_of(file: Path) -> tuple[frozenset[str], dict[str, str]]:
    """Return the classes that a source file defines at top level, and the names that it imports with ``from``."""
    classes: set[str] = set()
    imports: dict[str, str] = {}
    for node in ast.parse(file.read_bytes()).body:
        if isinstance(node, ast.ClassDef):
            classes.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module + "." if node.module else "")
            imports |= {alias.asname or alias.name: start + alias.name for alias in node.names}
    return frozenset(classes), imports
