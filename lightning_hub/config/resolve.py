"""The complete form of a recipe, with every default written out, and the differences between two recipes."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_hub.config.recipe import SEED_OPTION, Recipe
from lightning_hub.config.schema import SECTIONS, ClassInfo, Schema, shipped_schema
from lightning_hub.config.types import OptionType
from lightning_hub.config.yaml_reader import YamlValue


@dataclass(frozen=True)
class OptionChange:
    """One key that differs: its dotted path and both values; ``in_before`` and ``in_after`` say which side has it."""

    path: str
    before: YamlValue
    after: YamlValue
    in_before: bool = True
    in_after: bool = True


def fill_defaults(recipe: Recipe, schema: Schema | None = None) -> dict[str, YamlValue]:
    """Return the checked recipe with the defaults of the catalogue filled in.

    Sections and options are in the order of the catalogue, so equal recipes give equal trees. Classes keep their short
    names. Options of a class that is not in the catalogue stay as given.
    """
    catalogue = schema or shipped_schema()
    tree: dict[str, YamlValue] = {"seed_everything": recipe.tree.get("seed_everything", SEED_OPTION.default)}
    for section in SECTIONS[1:]:
        value = recipe.tree.get(section)
        if section in ("model", "data"):
            if value:
                tree[section] = _class_form(value, catalogue)
        elif info := catalogue.section(section):
            tree[section] = _filled(value if isinstance(value, dict) else {}, info, catalogue)
    return tree


def with_class_paths(tree: YamlValue, schema: Schema | None = None) -> YamlValue:
    """Return a tree in which every class of the catalogue has its full class path.

    The parser knows the short name of a class only after the class was imported.
    """
    catalogue = schema or shipped_schema()
    if isinstance(tree, list):
        return [with_class_paths(item, catalogue) for item in tree]
    if not isinstance(tree, dict):
        return tree
    full = {key: with_class_paths(value, catalogue) for key, value in tree.items()}
    info = catalogue.find(str(tree.get("class_path")))
    return full | {"class_path": info.path} if info else full


def _class_form(value: YamlValue, schema: Schema) -> YamlValue:
    spec: YamlValue = {"class_path": value} if isinstance(value, str) else value
    if not isinstance(spec, dict):
        return spec
    name, args = spec.get("class_path"), spec.get("init_args")
    info = schema.find(str(name))
    given = args if isinstance(args, dict) else {}
    form: dict[str, YamlValue] = {
        "class_path": info.name if info else name,
        "init_args": _filled(given, info, schema) if info else given,
    }
    return form | {key: child for key, child in spec.items() if key not in form}


def _filled(given: dict[str, YamlValue], info: ClassInfo, schema: Schema) -> dict[str, YamlValue]:
    full: dict[str, YamlValue] = {}
    for name, option in info.options.items():
        if name in given:
            full[name] = _value_form(given[name], option.type, schema)
        elif option.has_default:
            full[name] = option.default
    return full | {name: value for name, value in given.items() if name not in full}


def _value_form(value: YamlValue, type_: OptionType, schema: Schema) -> YamlValue:
    for member in type_.members():
        if member.head == "list" and isinstance(value, list):
            value = [_value_form(item, member.args[0], schema) for item in value]
        elif member.head == "class" and _is_class(value, type_, schema):
            return _class_form(value, schema)
        elif member.head == "settings" and isinstance(value, dict) and (info := schema.find(str(member.word))):
            return _filled(value, info, schema)
    return value


def _is_class(value: YamlValue, type_: OptionType, schema: Schema) -> bool:
    return isinstance(value, dict) or schema.find(str(value)) is not None or type_.names_only_a_class(value)


def diff(before: YamlValue, after: YamlValue, path: str = "") -> list[OptionChange]:
    """Return the differences between two trees, key by key; a list counts as one value."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = dict.fromkeys((*before, *after))
        return [change for key in keys for change in _diff_key(before, after, key, f"{path}.{key}" if path else key)]
    return [] if _same(before, after) else [OptionChange(path, before, after)]


def _diff_key(before: dict[str, YamlValue], after: dict[str, YamlValue], key: str, path: str) -> list[OptionChange]:
    if key in before and key in after:
        return diff(before[key], after[key], path)
    return [OptionChange(path, before.get(key), after.get(key), key in before, key in after)]


def _same(before: YamlValue, after: YamlValue) -> bool:
    return type(before) is type(after) and repr(before) == repr(after)
