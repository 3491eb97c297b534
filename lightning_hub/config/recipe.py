"""A recipe: YAML files merged in order, then overrides of the command line, with the source of each value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lightning_hub.config.schema import SECTIONS, Option, Schema, shipped_schema
from lightning_hub.config.yaml_reader import KeyPath, SourcePosition, YamlNode, YamlValue, parse_yaml, read_file
from lightning_hub.errors import ConfigError

CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")


@dataclass(frozen=True)
class RecipeSource:
    """One input of a recipe, unchanged: a file with its text, or a flag with its value."""

    name: str
    text: str


@dataclass(frozen=True)
class Override:
    """One ``--section.key value`` of the command line; ``append`` is true for the ``+=`` form."""

    flag: str
    keys: tuple[str, ...]
    text: str | None
    append: bool = False

    def names_class(self, schema: Schema) -> bool:
        """Whether it chooses a class. Such overrides are applied first, because they decide which options exist."""
        return self.keys[-1] == "class_path" or schema.find(self.text or "") is not None


@dataclass(frozen=True)
class Recipe:
    """The recipe that a user gave, as plain values.

    Attributes:
        tree: Sections by name: seed_everything, trainer, model, data, checkpoint.
        sources: The inputs, unchanged, in the order in which they were merged.
        notes: Sentences to print about the options that merging dropped.
    """

    tree: dict[str, YamlValue]
    sources: tuple[RecipeSource, ...] = ()
    notes: tuple[str, ...] = ()
    _places: Mapping[KeyPath, SourcePosition] = field(default_factory=dict, repr=False, compare=False)

    def where(self, path: str | KeyPath) -> str | None:
        """Return the ``file:line`` or the flag of a key, or of the nearest key above it; None if there is none."""
        keys = _keys(path) if isinstance(path, str) else path
        while keys:
            if keys in self._places:
                return str(self._places[keys])
            keys = keys[:-1]
        return None

    def get(self, path: str) -> YamlValue:
        """Return the value at a dotted path, or None."""
        value: YamlValue = self.tree
        for key in _keys(path):
            if isinstance(value, dict):
                value = value.get(str(key))
            elif isinstance(value, list) and isinstance(key, int) and key < len(value):
                value = value[key]
            else:
                return None
        return value


def keyed_fault(recipe: Recipe, path: str | KeyPath, message: str, remedy: str | None = None) -> ConfigError:
    """Return the error for one key of a recipe: where it is, the key, what was given, what to do."""
    key = path if isinstance(path, str) else ".".join(map(str, path))
    where = recipe.where(path)
    text = message if where == f"--{key}" else f"{key}: {message}"  # the name of a flag is its key
    return ConfigError(text, where=where, remedy=remedy)


def _keys(path: str) -> KeyPath:
    return tuple(int(key) if key.isdigit() else key for key in path.split(".")) if path else ()


def build_recipe(
    files: Iterable[str | Path], overrides: Iterable[Override] = (), schema: Schema | None = None
) -> Recipe:
    """Read files, merge them (a later file overrides an earlier one) and apply the overrides.

    Raises:
        ConfigError: A file cannot be read, or an override names an item that does not exist.
    """
    catalogue = schema or shipped_schema()
    merge = _Merge(catalogue)
    for file in files:
        node, text = read_file(file)
        merge.overlay(node, RecipeSource(str(file), text))
    for override in sorted(overrides, key=lambda item: not item.names_class(catalogue)):
        merge.override(override)
    return merge.recipe()


def recipe_from_text(text: str, source: str, schema: Schema | None = None) -> Recipe:
    """Read a recipe from text, for example from an editor.

    Raises:
        ConfigError: The text is not YAML, or not a mapping.
    """
    merge = _Merge(schema or shipped_schema())
    node = parse_yaml(text, source)
    if not isinstance(node.value, dict | None):
        raise ConfigError("is not a mapping of sections", where=str(node.place), remedy="start with trainer: or model:")
    merge.overlay(node if node.value is not None else YamlNode({}, node.place), RecipeSource(source, text))
    return merge.recipe()


class _Merge:
    """Merges YAML nodes. It keeps the position of each value, and notes the options that a change of class drops.

    Example: ``model: {class_path: SFT, init_args: {learning_rate: 1e-5}}`` and the override ``--model.eps 1e-6``.
    ``insert_init_args`` turns the keys ``model, eps`` into ``model, init_args, eps``. ``coerce_to_option`` would keep
    the text if ``SFT.eps`` took text. ``set_value`` puts the number next to ``learning_rate``.
    """

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.root = YamlNode({}, SourcePosition(""))
        self.sources: list[RecipeSource] = []
        self.notes: list[str] = []

    def recipe(self) -> Recipe:
        tree = self.root.plain()
        assert isinstance(tree, dict), "a recipe is a mapping"
        return Recipe(tree, tuple(self.sources), tuple(self.notes), dict(self.root.places()))

    def overlay(self, node: YamlNode, source: RecipeSource) -> None:
        self.sources.append(source)
        self.root = self.merged(self.root, _with_class_nodes(node), ())

    def merged(self, old: YamlNode | None, new: YamlNode, path: KeyPath) -> YamlNode:
        """Return both nodes merged: mappings are merged key by key, everything else is replaced by the new node."""
        if old is None or not isinstance(new.value, dict) or not isinstance(old.value, dict):
            return new
        kept = self.kept_for_class(old.value, new, path)
        both = dict(kept)
        for key, child in new.value.items():
            both[key] = self.merged(kept.get(key), child, (*path, key))
        return YamlNode.collection(both, new.place)

    def kept_for_class(self, old: dict[str, YamlNode], new: YamlNode, path: KeyPath) -> dict[str, YamlNode]:
        """Return the old keys that stay. With a new class, options that it does not have are dropped, with a note."""
        assert isinstance(new.value, dict), "only mappings are merged"
        before, after = old.get("class_path"), new.value.get("class_path")
        if after is None or before is None or before.value == after.value or "init_args" not in old:
            return old
        info, args = self.schema.find(str(after.value)), old["init_args"].value
        if info is None or info.takes_other_keys or not isinstance(args, dict):
            return old
        dropped = [key for key in args if key not in info.options]
        if not dropped:
            return old
        names = ", ".join(f"{key} ({args[key].place})" for key in dropped)
        self.notes.append(
            f"{after.place}: {'.'.join(map(str, path))} is now {info.name}, which does not have {names}: left out"
        )
        left = {key: child for key, child in args.items() if key in info.options}
        return {**old, "init_args": YamlNode.collection(left, old["init_args"].place)}

    def override(self, override: Override) -> None:
        value = _override_value(override)
        self.sources.append(RecipeSource(override.flag, override.text or "true"))
        keys = self.insert_init_args(override.keys)
        value = self.coerce_to_option(value, keys, override)
        self.root = self.set_value(self.root, keys, value, override, ())

    def insert_init_args(self, keys: tuple[str, ...]) -> tuple[str, ...]:
        """Insert ``init_args`` after a class: ``model.learning_rate`` becomes ``model.init_args.learning_rate``."""
        out: list[str] = []
        node: YamlNode | None = self.root
        for key in keys:
            node = self.as_class(node)
            is_class = out in (["model"], ["data"]) or (
                node is not None and isinstance(node.value, dict) and "class_path" in node.value
            )
            if is_class and key not in CLASS_KEYS:
                node = _child(node, "init_args")
                out.append("init_args")
            node = _child(node, key)
            out.append(key)
        return tuple(out)

    def as_class(self, node: YamlNode | None) -> YamlNode | None:
        """Return a class that is given by its name alone in the form with ``class_path``, which can have options."""
        is_name = node is not None and isinstance(node.value, str) and self.schema.find(node.value)
        return YamlNode.collection({"class_path": node}, node.place) if node is not None and is_name else node

    def coerce_to_option(self, node: YamlNode, keys: tuple[str, ...], override: Override) -> YamlNode:
        """Return the text itself if the option takes text: in ``--data.train 2024`` the value is a file name."""
        option = find_option(self.root, keys, self.schema)
        if option is not None and option.type.kinds() and not override.append and self.schema.find(node.text or ""):
            return YamlNode.collection({"class_path": node}, node.place)
        if option is None or node.text is None or option.type.accepts(node.plain()):
            return node
        if override.text is None:
            raise ConfigError(f"needs a value: {option.type.describe()}", where=override.flag)
        return replace(node, value=node.text) if option.type.accepts(node.text) else node

    def set_value(
        self, node: YamlNode | None, keys: tuple[str, ...], value: YamlNode, override: Override, path: KeyPath
    ) -> YamlNode:
        if not keys:
            return (
                _appended(node, value) if override.append else self.merged(node, _with_class_nodes(value, path), path)
            )
        key, rest = keys[0], keys[1:]
        if node is not None and isinstance(node.value, list):
            return self.set_item(node, key, rest, value, override, path)
        children = dict(node.value) if node is not None and isinstance(node.value, dict) else {}
        child = self.set_value(children.get(key), rest, value, override, (*path, key))
        if key == "class_path" and node is not None:
            children = self.kept_for_class(children, YamlNode({key: child}, child.place), path)
        place = node.place if node is not None and node.place.source else value.place
        return YamlNode.collection({**children, key: child}, place)

    def set_item(
        self, node: YamlNode, key: str, rest: tuple[str, ...], value: YamlNode, override: Override, path: KeyPath
    ) -> YamlNode:
        assert isinstance(node.value, list), "items are assigned in lists"
        if not key.isdigit() or int(key) >= len(node.value):
            known = f"0 to {len(node.value) - 1}" if node.value else "none yet, use +="
            remedy = f"write --{'.'.join(map(str, path))}.{len(node.value) - 1}.{key}" if node.value else None
            raise ConfigError(f"{key!r} is not an item of this list ({known})", where=override.flag, remedy=remedy)
        items = list(node.value)
        item = self.as_class(items[int(key)]) if rest else items[int(key)]
        items[int(key)] = self.set_value(item, rest, value, override, (*path, int(key)))
        return YamlNode.collection(items, node.place)


def _child(node: YamlNode | None, key: str) -> YamlNode | None:
    if node is not None and isinstance(node.value, dict):
        return node.value.get(key)
    if node is not None and isinstance(node.value, list) and key.isdigit() and int(key) < len(node.value):
        return node.value[int(key)]
    return None


def _appended(node: YamlNode | None, value: YamlNode) -> YamlNode:
    before = [] if node is None or node.value is None else node.value if isinstance(node.value, list) else [node]
    after = value.value if isinstance(value.value, list) else [value]
    return YamlNode.collection([*before, *after], value.place)


def _with_class_nodes(node: YamlNode, path: KeyPath = ()) -> YamlNode:
    """Write ``model: LoRA`` as ``model: {class_path: LoRA}``, so that it merges with options."""
    if path in (("model",), ("data",)) and isinstance(node.value, str):
        return YamlNode.collection({"class_path": node}, node.place)
    if len(path) == 1 and path[0] in SECTIONS[1:] and node.value is None:
        return YamlNode({}, node.place)  # a section whose options are all commented out
    if path or not isinstance(node.value, dict):
        return node
    return YamlNode.collection({key: _with_class_nodes(child, (key,)) for key, child in node.value.items()}, node.place)


def _override_value(override: Override) -> YamlNode:
    place = SourcePosition(override.flag)
    if override.text is None:
        return YamlNode(True, place, "true")
    try:
        node = parse_yaml(override.text, override.flag)
    except ConfigError as error:
        if override.text.lstrip().startswith(("[", "{", '"', "'")):
            raise ConfigError(f"{override.text!r:.80} is not a value: {error.message}", where=override.flag) from None
        return YamlNode(override.text, place, override.text)
    return replace(_at(node, place), text=override.text)


def _at(node: YamlNode, place: SourcePosition) -> YamlNode:
    if isinstance(node.value, list):
        return YamlNode.collection([_at(child, place) for child in node.value], place)
    if isinstance(node.value, dict):
        return YamlNode.collection({key: _at(child, place) for key, child in node.value.items()}, place)
    return replace(node, place=place)


def find_option(root: YamlNode, keys: tuple[str, ...], schema: Schema) -> Option | None:
    """Return the option at a key path of this recipe, or None if it is not in the catalogue."""
    if keys == ("seed_everything",):
        return SEED_OPTION
    node = _child(root, keys[0])
    info = schema.section(keys[0], _class_name(node))
    option: Option | None = None
    for key in keys[1:]:
        if key != "init_args":
            option = info.options.get(key) if info is not None else None
            info = schema.find(_class_name(_child(node, key)) or "") or schema.settings_of(option)
        node = _child(node, key)
    return option


def _class_name(node: YamlNode | None) -> str | None:
    named = _child(node, "class_path") if node is not None else None
    return str(named.value) if named is not None else None


SEED_OPTION = Option("seed_everything", "int | bool", default=42, help="The seed of every random choice of a run.")
"""The only option that does not belong to a class: an integer, or ``true`` for a seed that is chosen and recorded."""
