"""Split a command line into its recipe (files and overrides) and the arguments of the command itself."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass

from lightning_hub.config.recipe import Override, Recipe, build_recipe
from lightning_hub.config.schema import SECTIONS, Schema, shipped_schema
from lightning_hub.config.shipped import is_shipped, recipe_path, shipped_recipes
from lightning_hub.config.suggest import SYNONYMS, nearest
from lightning_hub.errors import ConfigError

_FLAG = re.compile(r"--(?P<keys>[A-Za-z_][\w.-]*?)(?P<append>\+)?(?:=(?P<value>.*))?", re.DOTALL)
_ASSIGNMENT = re.compile(r"[A-Za-z_][\w-]*(\.[\w.-]+)?\+?=.*", re.DOTALL)
_NEGATIVE = re.compile(r"-\.?\d")


SHORT_FLAGS = {"logger": ("trainer", "logger")}
"""Flags that set an option of a recipe."""

LOGGERS = {"wandb": "WandbLogger", "tensorboard": "TensorBoardLogger", "mlflow": "MLFlowLogger", "csv": "CSVLogger"}
"""Short names of Lightning's loggers."""

FLAGS_OF_OTHERS = {
    "output_dir": "--run-dir",
    "out_dir": "--run-dir",
    "ckpt_output_dir": "--run-dir",
    "default_root_dir": "--runs-root",
    "experiment_name": "--run-name",
    "name": "--run-name",
    "resume_from_checkpoint": "--resume",
    "ckpt_path": "--resume",
    "config_file": "--config",
    "report_to": "--logger",
}
"""Flags of other tools, and our flags for the same purpose."""


@dataclass(frozen=True)
class Command:
    """A parsed command line.

    Attributes:
        recipe: The merged files with the overrides applied; not yet checked.
        rest: The other arguments (``--run-dir``, ``--resume`` ...), in their order, for the caller's own parser.
    """

    recipe: Recipe
    rest: tuple[str, ...]


@dataclass(frozen=True)
class SplitArguments:
    """Config files and overrides of a command line, and the remaining arguments."""

    files: tuple[str, ...]
    overrides: tuple[Override, ...]
    rest: tuple[str, ...]


def parse_command(argv: Iterable[str], schema: Schema | None = None, valued: Container[str] = ()) -> Command:
    """Read ``--config A --config B --model LoRA --model.learning_rate 1e-5 --run-dir D``.

    ``--config`` and the dashes of an override can be left out: ``sft model.learning_rate=1e-5``.

    Nothing is imported and no option is checked here. ``check_recipe`` checks the options.

    Args:
        argv: The arguments after the name of the command.
        schema: The catalogue; the shipped one by default.
        valued: The command's own flags that take a value. The word after such a flag is never a recipe.

    Raises:
        ConfigError: A file cannot be read, a flag has no value, or ``x`` in ``--x.y`` is not a section.
    """
    parts = split_arguments(argv, valued)
    return Command(build_recipe(parts.files, parts.overrides, schema), parts.rest)


def split_arguments(argv: Iterable[str], valued: Container[str] = ()) -> SplitArguments:
    """Split the arguments without reading a file. After ``--`` nothing belongs to the recipe.

    Args:
        argv: The arguments after the name of the command.
        valued: The command's own flags that take a value.
    """
    files: list[str] = []
    overrides: list[Override] = []
    rest: list[str] = []
    waiting = list(argv)
    while waiting:
        word = waiting.pop(0)
        if word == "--":
            rest += [word, *waiting]
            break
        if word in valued:
            rest += [word, *waiting[:1]]
            del waiting[:1]
            continue
        match = _FLAG.fullmatch(_with_dashes(word))
        if match is None and (word.endswith((".yaml", ".yml")) or is_shipped(word)):
            files.append(recipe_path(word))
        elif match is None:
            rest.append(word)
        elif match["keys"] == "config":
            files.append(recipe_path(_value(match, waiting) or _missing_value("--config", "a YAML file")))
        elif _belongs_to_recipe(match):
            overrides.append(_override(match, waiting))
        else:
            rest.append(word)
    return SplitArguments(tuple(files), tuple(overrides), tuple(rest))


def _with_dashes(word: str) -> str:
    """Return the long form of ``-c FILE`` and of ``section.option=value``."""
    if re.match(r"-c(=|$)", word):
        return "--config" + word[2:]
    return f"--{word}" if _ASSIGNMENT.fullmatch(word) else word


def _belongs_to_recipe(match: re.Match[str]) -> bool:
    section, dot, _ = match["keys"].partition(".")
    if section in SECTIONS or section in SHORT_FLAGS:
        return True
    if dot:
        near = nearest(section, SECTIONS)
        remedy = f"did you mean --{near}.{match['keys'].partition('.')[2]}?" if near else None
        known = ", ".join(SECTIONS)
        message = f"{section!r} is not a section of a recipe ({known})"
        raise ConfigError(message, where=f"--{match['keys']}", remedy=remedy)
    return False


def _override(match: re.Match[str], waiting: list[str]) -> Override:
    flag = f"--{match['keys']}"
    keys = SHORT_FLAGS.get(match["keys"]) or tuple(match["keys"].split("."))
    if not all(keys):
        raise ConfigError("the flag has an empty key", where=flag, remedy="write --section.option value")
    value = _value(match, waiting)
    if keys == ("trainer", "logger") and value is not None:
        value = LOGGERS.get(value, value)
    return Override(flag, keys, value, append=bool(match["append"]))


def _value(match: re.Match[str], waiting: list[str]) -> str | None:
    if match["value"] is not None:
        return match["value"]
    if waiting and (not waiting[0].startswith("-") or _NEGATIVE.match(waiting[0]) or waiting[0] == "-"):
        return waiting.pop(0)
    return None


def _missing_value(flag: str, what: str) -> str:
    raise ConfigError(f"{flag} needs a value", where=flag, remedy=f"give {what}")


def explain_flag(flag: str, known: Iterable[str], schema: Schema | None = None) -> ConfigError:
    """Return the error for an unknown flag, with the nearest flag or option of a recipe.

    Args:
        flag: The flag as given, with or without ``=value``.
        known: The command's own flags.
        schema: The catalogue.
    """
    name = flag.partition("=")[0]
    word = name.lstrip("-").replace("-", "_")
    if not flag.startswith("-") and "=" not in flag:
        near = nearest(word, [shipped.rpartition("/")[2] for shipped in shipped_recipes()])
        remedy = f"did you mean {near}?" if near else "see --help"
        return ConfigError("unexpected argument", where=name, remedy=remedy)
    options = _full_names(schema or shipped_schema())
    wanted = next((options[name] for name in (word, *SYNONYMS.get(word, ())) if name in options), None)
    listed = list(known)
    translated = FLAGS_OF_OTHERS.get(word)
    near = translated if translated in listed else None if wanted else nearest(name, listed)
    if near is None and wanted is None:
        close = nearest(word, options)
        wanted = options[close] if close else None
    dashes = "--" if flag.startswith("-") else ""
    remedy = f"did you mean {near}?" if near else f"did you mean {dashes}{wanted}?" if wanted else "see --help"
    return ConfigError("unknown flag" if dashes else "no such option", where=name, remedy=remedy)


def _full_names(schema: Schema) -> dict[str, str]:
    """Map each option of the classes of the sections to its dotted flag."""
    names: dict[str, str] = {}
    for kind in ("checkpoint", "data", "model", "trainer"):
        for info in schema.of_kind(kind):
            names |= {option: f"{kind}.{option}" for option in info.options}
    return names | {"seed_everything": "seed_everything", "seed": "seed_everything"}
