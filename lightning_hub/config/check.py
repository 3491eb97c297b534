"""Check a recipe against the option catalogue before any heavy import. Every fault is reported, in one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from lightning_hub.config.bounds import Bounds
from lightning_hub.config.recipe import CLASS_KEYS, SEED_OPTION, Recipe, keyed_fault
from lightning_hub.config.registry import LIGHTNING_CLI_SECTIONS, REFUSED
from lightning_hub.config.resolve import fill_defaults
from lightning_hub.config.rules import check_rules
from lightning_hub.config.safety import AllowList, check_names
from lightning_hub.config.schema import SECTIONS, ClassInfo, Option, Schema, shipped_schema
from lightning_hub.config.secrets import check_secrets, is_secret, mask_secrets
from lightning_hub.config.suggest import find_in_other_sections, nearest, strategy_with
from lightning_hub.config.types import OptionType
from lightning_hub.config.yaml_reader import KeyPath, YamlValue
from lightning_hub.errors import ConfigError

_SHOWN = 80


class RecipeError(ConfigError):
    """All faults of one recipe; ``message``, ``where`` and ``remedy`` are those of the first fault.

    Attributes:
        faults: Every fault, in the order of the recipe.
    """

    def __init__(self, faults: Iterable[ConfigError]) -> None:
        self.faults = tuple(faults)
        first = self.faults[0]
        super().__init__(first.message, where=first.where, remedy=first.remedy)

    def __str__(self) -> str:
        return "\n".join(str(fault) for fault in self.faults)


def check_recipe(recipe: Recipe, *, allow_classes: Iterable[str] = (), schema: Schema | None = None) -> None:
    """Refuse a recipe that names an unknown key, a wrong value, a forbidden class or a literal secret.

    Args:
        recipe: The merged recipe.
        allow_classes: Prefixes given by ``--allow-class``.
        schema: The catalogue; the shipped one by default.

    Raises:
        RecipeError: With every fault found.
    """
    faults = list(find_faults(recipe, allow_classes=allow_classes, schema=schema))
    if faults:
        raise RecipeError(faults)


def find_faults(
    recipe: Recipe, *, allow_classes: Iterable[str] = (), schema: Schema | None = None
) -> list[ConfigError]:
    """Return every fault of a recipe once; see ``check_recipe``."""
    catalogue = schema or shipped_schema()
    allowed = AllowList.with_more(allow_classes)
    checker = _Checker(recipe, catalogue, allowed)
    found = (
        *check_names(recipe, catalogue, allowed),
        *checker.sections(),
        *check_secrets(recipe),
        *check_rules(recipe, fill_defaults(recipe, catalogue)),
    )
    faults = {str(fault): fault for fault in map(_masked, found)}
    sources = [source.name for source in recipe.sources]
    return sorted(faults.values(), key=lambda fault: _position(fault, sources))


def _masked(fault: ConfigError) -> ConfigError:
    """Return a fault in which no key or value shows a secret."""
    return ConfigError(
        mask_secrets(fault.message), where=mask_secrets(fault.where) if fault.where else None, remedy=fault.remedy
    )


def _position(fault: ConfigError, sources: list[str]) -> tuple[int, int]:
    """Return the sort key of a fault: the index of its file or flag (files first), then its line."""
    source, _, line = (fault.where or "").rpartition(":")
    name, number = (source, int(line)) if line.isdigit() else (fault.where, 0)
    return (sources.index(name) if name in sources else len(sources), number)


class _Checker:
    """Compares a recipe with the catalogue, key by key."""

    def __init__(self, recipe: Recipe, schema: Schema, allowed: AllowList) -> None:
        self.recipe = recipe
        self.schema = schema
        self.allowed = allowed
        self.chosen = self._chosen_classes()

    def _chosen_classes(self) -> dict[str, ClassInfo]:
        """Return the class of each section; for a section without a class name, the first class of that kind."""
        chosen = {}
        for section in SECTIONS[1:]:
            named = self.recipe.get(f"{section}.class_path")
            info = self.schema.section(section, str(named)) or next(iter(self.schema.of_kind(section)), None)
            if info is not None:
                chosen[section] = info
        return chosen

    def fault(self, path: KeyPath, message: str, remedy: str | None = None) -> ConfigError:
        return keyed_fault(self.recipe, path, message, remedy)

    def sections(self) -> Iterator[ConfigError]:
        for key in self.recipe.tree:
            if key in LIGHTNING_CLI_SECTIONS:
                yield self.fault((key,), "not a section of a recipe", LIGHTNING_CLI_SECTIONS[key])
            elif key not in SECTIONS:
                yield self.unknown((key,), SECTIONS, "not a section of a recipe", None)
        if "seed_everything" in self.recipe.tree:
            yield from self.option(("seed_everything",), self.recipe.tree["seed_everything"], SEED_OPTION)
        for section in ("trainer", "checkpoint"):
            value = self.recipe.tree.get(section)
            if value is not None and (info := self.schema.section(section)):
                yield from self.options((section,), value, info)
        for section in ("model", "data"):
            yield from self.class_section(section)

    def class_section(self, section: str) -> Iterator[ConfigError]:
        value = self.recipe.tree.get(section)
        if not value:
            names = ", ".join(info.name for info in self.schema.of_kind(section))
            yield ConfigError(
                f"{section} is missing",
                where=self.recipe.where(section) or self._any_source(),
                remedy=f"give its class_path ({names}) and its init_args",
            )
        else:
            yield from self.class_value((section,), value, section)

    def _any_source(self) -> str | None:
        return self.recipe.sources[0].name if self.recipe.sources else "--config"

    def class_value(self, path: KeyPath, value: YamlValue, kind: str) -> Iterator[ConfigError]:
        """Check a class given by name, or as ``class_path`` with ``init_args``."""
        spec: YamlValue = {"class_path": value} if isinstance(value, str) else value
        names = [info.name for info in self.schema.of_kind(kind)]
        if not isinstance(spec, dict):
            yield self.fault(path, f"{_shown(path, value)} is not a class", f"write class_path ({', '.join(names)})")
            return
        name = spec.get("class_path")
        info = self.schema.find(str(name))
        for key in spec:
            if key not in CLASS_KEYS:
                yield self.misplaced((*path, key), info or self.chosen.get(kind))
        if not isinstance(name, str):
            given = "class_path is missing" if name is None else f"{_shown(path, name)} is not a class path"
            yield self.fault(path, given, f"choose one of {', '.join(names)}")
            return
        if info is None or info.kind != kind:
            yield from self.unknown_class((*path, "class_path"), name, kind, info)
            return
        yield from self.options((*path, "init_args"), spec.get("init_args"), info)
        if "dict_kwargs" in spec and not info.takes_other_keys:
            yield self.fault((*path, "dict_kwargs"), f"{info.name} does not take other keys", "use init_args")

    def misplaced(self, path: KeyPath, info: ClassInfo | None) -> ConfigError:
        """Return the fault of an unknown key next to class_path: usually an option that belongs under init_args."""
        near = nearest(str(path[-1]), (*CLASS_KEYS, *(info.options if info else ())))
        if info is not None and near in info.options:
            inside = ".".join(map(str, (*path[:-1], "init_args", near)))
            return self.fault(path, f"options of {info.name} belong under init_args", f"write {inside}")
        return self.unknown(path, CLASS_KEYS, "unknown key next to class_path", info)

    def unknown_class(self, path: KeyPath, name: str, kind: str, other: ClassInfo | None) -> Iterator[ConfigError]:
        """Yield the fault of a name that is not a class of this kind; ``safety`` checks unknown class paths."""
        names = [info.name for info in self.schema.of_kind(kind)]
        last = name.rpartition(".")[2]
        if other is not None:
            remedy = f"it is a {other.kind} class; choose one of {', '.join(names)}"
            yield self.fault(path, f"{other.name} is not a {kind} class", remedy)
        elif last in REFUSED:
            yield self.fault(path, f"{last} cannot be used", REFUSED[last])
        elif "." not in name:
            near = nearest(name, names)
            remedy = f"did you mean {near}?" if near else f"choose one of {', '.join(names)}, or give a full class path"
            yield self.fault(path, f"no {kind} class is named {name!r:.80}", remedy)

    def options(self, path: KeyPath, value: YamlValue, info: ClassInfo) -> Iterator[ConfigError]:
        """Check a mapping of options against its class."""
        if value is not None and not isinstance(value, dict):
            given_text = _shown(path, value)
            yield self.fault(path, f"{given_text} is not a mapping of options", f"write the options of {info.name}")
            return
        given = value or {}
        for name, option in info.options.items():
            if option.required and given.get(name) is None:
                remedy = f"set {'.'.join(map(str, (*path, name)))}: {option.type.describe()}"
                yield self.fault(path, f"{info.name} needs {name}", remedy)
        for key, child in given.items():
            if key in info.options:
                yield from self.option((*path, key), child, info.options[key])
            elif not info.takes_other_keys:
                yield self.unknown((*path, key), info.options, f"not an option of {info.name}", info)

    def option(self, path: KeyPath, value: YamlValue, option: Option) -> Iterator[ConfigError]:
        """Check one value: type, range, and the classes and settings inside it."""
        if value is None and option.has_default and option.default is None:
            return
        if isinstance(value, str) and value.startswith("${env:"):
            return  # its value is read and checked where it is used
        inner = list(self.nested(path, value, option.type))
        if inner or not option.type.accepts(value):
            yield from inner or [self.wrong_type(path, value, option)]
        elif not Bounds(option.range).hold(value):
            yield self.fault(
                path, f"{_shown(path, value)} is out of range", f"give a number {option.range or 'that is finite'}"
            )

    def nested(self, path: KeyPath, value: YamlValue, type_: OptionType) -> Iterator[ConfigError]:
        """Check the classes and settings inside a value."""
        for member in type_.members():
            if member.head == "list" and isinstance(value, list):
                for index, item in enumerate(value):
                    yield from self.nested((*path, index), item, member.args[0])
            elif member.head == "class" and (isinstance(value, dict) or type_.names_only_a_class(value)):
                yield from self.class_value(path, value, str(member.word))
            elif member.head == "settings" and isinstance(value, dict) and (info := self.schema.find(str(member.word))):
                yield from self.options(path, value, info)

    def wrong_type(self, path: KeyPath, value: YamlValue, option: Option) -> ConfigError:
        choices = option.type.choices()
        near = nearest(str(value), choices) if isinstance(value, str) else None
        remedy = f"did you mean {near}?" if near else None
        return self.fault(path, f"{_shown(path, value)} is not {option.type.describe()}", remedy)

    def unknown(self, path: KeyPath, names: Iterable[str], what: str, here: ClassInfo | None) -> ConfigError:
        """Return the fault of an unknown key, with the nearest name here or the section that has this key."""
        key = str(path[-1])
        other = find_in_other_sections(key, self.schema, here, self.chosen)
        near = nearest(key, names)
        if near is not None and (other is None or near.lower() == key.lower()):
            return self.fault(path, what, f"did you mean {near}?")
        if other is not None:
            return self.fault(path, what, f"it belongs to {other.partition('.')[0]}: write {other}")
        if path[0] in SECTIONS[1:] and (strategy := strategy_with(key, self.schema)) is not None:
            where = f"trainer.strategy: {{class_path: {strategy}, init_args: {{{key}: ...}}}}"
            return self.fault(path, what, f"it belongs to a strategy: write {where}")
        return self.fault(path, what, f"known: {', '.join(names)}")


def _shown(path: KeyPath, value: YamlValue) -> str:
    """Return a value as a message shows it: short, and without secrets."""
    if is_secret(str(path[-1]), value):
        return "the value (not shown)"
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, float) else repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
