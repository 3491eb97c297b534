"""Help for recipes, from the option catalogue: instant, as nothing has to be imported for it."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Iterable

from lightning_hub.config.schema import SECTIONS, ClassInfo, Option, Schema, shipped_schema
from lightning_hub.config.suggest import nearest
from lightning_hub.errors import ConfigError

_FLAG = re.compile(r"--(?P<section>[\w.]+)\.help(?:=(?P<name>.*))?")


def class_help(argv: Iterable[str], schema: Schema | None = None) -> str | None:
    """Return the help that a command line asks for with ``--model.help SFT`` and the like, or None.

    Raises:
        ConfigError: It names a section or class that is not there.
    """
    catalogue = schema or shipped_schema()
    words = list(argv)
    for place, word in enumerate(words):
        if match := _FLAG.fullmatch(word):
            name = match["name"] or next(iter(words[place + 1 : place + 2]), "")
            return _section_help(match["section"], name if not name.startswith("-") else "", catalogue)
    return None


def _section_help(section: str, name: str, schema: Schema) -> str:
    kind = {"trainer.callbacks": "callback", "trainer.logger": "logger", "trainer.strategy": "strategy"}.get(section)
    kind = kind or section
    known = schema.of_kind(kind)
    if not known:
        near = nearest(section, SECTIONS[1:])
        remedy = f"did you mean --{near}.help?" if near else f"use one of {', '.join(SECTIONS[1:])}"
        raise ConfigError(f"there is no section {section!r}", where=f"--{section}.help", remedy=remedy)
    if not name and len(known) > 1:
        return overview(known)
    chosen = schema.find(name) if name else known[0]
    if chosen is None or chosen.kind != kind:
        near = nearest(name, [info.name for info in known])
        remedy = f"did you mean {near}?" if near else f"use one of {', '.join(info.name for info in known)}"
        raise ConfigError(f"there is no {kind} {name!r}", where=f"--{section}.help", remedy=remedy)
    return describe(chosen)


def overview(classes: Iterable[ClassInfo]) -> str:
    """Return classes with a line each."""
    listed = list(classes)
    width = max(len(info.name) for info in listed)
    return "\n".join(f"  {info.name:<{width}}  {info.summary}" for info in listed)


def describe(info: ClassInfo) -> str:
    """Return a class with all its options: name, type, default, help."""
    lines = [f"{info.name}: {info.summary}", f"({info.path})", ""]
    for option in info.options.values():
        lines += [f"  {_signature(option)}", *_wrapped(option.help)]
    return "\n".join(lines)


def _signature(option: Option) -> str:
    bounds = f", {option.range}" if option.range else ""
    if option.required:
        return f"{option.name}: {option.type.describe()}{bounds} (required)"
    default = f" = {json.dumps(option.default)}" if option.has_default else ""
    return f"{option.name}: {option.type.describe()}{bounds}{default}"


def _wrapped(text: str) -> list[str]:
    width = min(100, shutil.get_terminal_size().columns)
    return textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)


def recipe_help(verb: str, flags: Iterable[tuple[str, str]], schema: Schema | None = None) -> str:
    """Return the help of a command that takes a recipe.

    Args:
        verb: The command's word.
        flags: Its own flags, each with its help.
        schema: The catalogue; the shipped one by default.
    """
    catalogue = schema or shipped_schema()
    listed = list(flags)
    width = max(len(flag) for flag, _ in listed)
    own = "\n".join(f"  {flag:<{width}}  {text}" for flag, text in listed)
    return f"""\
usage: lightning-hub {verb} --config RECIPE.yaml [--config ...] [--section.option VALUE ...] [FLAGS]

A recipe has the sections {", ".join(SECTIONS)}. Later files win over earlier ones, options given
here win over files: --trainer.max_epochs 3 --model.learning_rate 2e-5. --trainer.callbacks+=NAME appends.

models:
{overview(catalogue.of_kind("model"))}
data:
{overview(catalogue.of_kind("data"))}

Options of a class: --model.help SFT, --data.help ChatData, --trainer.help, --checkpoint.help,
--trainer.callbacks.help [NAME], --trainer.logger.help [NAME].

flags:
{own}"""
