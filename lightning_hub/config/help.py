"""Help for recipes, from the option catalogue. It is fast, because no class has to be imported."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable

from lightning_hub.config.schema import SECTIONS, ClassInfo, Option, Schema, shipped_schema
from lightning_hub.config.suggest import nearest
from lightning_hub.errors import ConfigError

_FLAG = re.compile(r"--(?P<section>[\w.]+)\.help(?:=(?P<name>.*))?")


WIDTH = 80
"""Number of columns at which help is wrapped: the width of a small terminal."""


def plain_text(text: str | None) -> str:
    """Return a docstring as help text: without the markup of reStructuredText."""
    return (text or "").replace("``", "").replace("`", "")


def class_help(argv: Iterable[str], schema: Schema | None = None) -> str | None:
    """Return the help that a command line asks for, for example with ``--model.help SFT``, or None.

    Raises:
        ConfigError: The section or class does not exist.
    """
    catalogue = schema or shipped_schema()
    words = list(argv)
    for index, word in enumerate(words):
        if match := _FLAG.fullmatch(word):
            name = match["name"] or next(iter(words[index + 1 : index + 2]), "")
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
    return describe_option(chosen)


def overview(classes: Iterable[ClassInfo]) -> str:
    """Return one line for each class."""
    listed = list(classes)
    return "\n".join(_rows([(info.name, plain_text(info.summary)) for info in listed]))


def _rows(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Return the lines of a table of names and texts; long texts are wrapped."""
    listed = list(rows)
    column = max((len(name) for name, _ in listed), default=0) + 4
    return [
        line
        for name, text in listed
        for line in textwrap.wrap(
            text or "-", WIDTH, initial_indent=f"  {name}".ljust(column), subsequent_indent=" " * column
        )
    ]


def describe_option(info: ClassInfo) -> str:
    """Return a class with all its options: name, type, default, help."""
    lines = [*textwrap.wrap(f"{info.name}: {plain_text(info.summary)}", WIDTH), f"({info.path})", ""]
    for option in info.options.values():
        lines += textwrap.wrap(_signature(option), WIDTH, initial_indent="  ", subsequent_indent=" " * 8)
        lines += _wrapped(plain_text(option.help))
    return "\n".join(lines)


def _signature(option: Option) -> str:
    bounds = f", {option.range}" if option.range else ""
    if option.required:
        return f"{option.name}: {option.type.describe()}{bounds} (required)"
    default = f" = {json.dumps(option.default)}" if option.has_default else ""
    return f"{option.name}: {option.type.describe()}{bounds}{default}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def recipe_help(verb: str, flags: Iterable[tuple[str, str]], schema: Schema | None = None) -> str:
    """Return the help of a command that takes a recipe.

    Args:
        verb: The name of the command.
        flags: Its own flags, each with its help.
        schema: The catalogue; the shipped one by default.
    """
    catalogue = schema or shipped_schema()
    own = "\n".join(_rows(flags))
    return f"""\
usage: lightning-hub {verb} RECIPE [RECIPE ...] [section.option=VALUE ...] [FLAGS]

A RECIPE is a YAML file, or the name of a shipped one (sft, lora, osft, fsdp).
--config RECIPE and --section.option VALUE mean the same. Its sections are
{", ".join(SECTIONS)}.
Later files override earlier ones, and options given here override files:
trainer.max_epochs=3 model.learning_rate=2e-5. trainer.callbacks+=NAME appends.

models:
{overview(catalogue.of_kind("model"))}
data:
{overview(catalogue.of_kind("data"))}

Options of a class: --model.help SFT, --data.help ChatData, --trainer.help,
--checkpoint.help, --trainer.callbacks.help [NAME],
--trainer.logger.help [NAME].

flags:
{own}"""
