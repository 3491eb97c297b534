"""Recipes: read, merge, override, check and write them, without loading torch.

The way of a command line::

    command = parse_command(argv)              # files merged, overrides applied; the rest is the caller's
    check(command.recipe, allow_classes=...)   # RecipeError with every fault, before anything is imported
    tree = fill_defaults(command.recipe)       # every option written out
    text = dump(tree)                          # config.yaml; the same text for the same recipe
"""

from __future__ import annotations

from lightning_hub.config.check import RecipeError, check, find_faults
from lightning_hub.config.command import Command, SplitArguments, explain_flag, parse_command, split_arguments
from lightning_hub.config.reading import KeyPath, Place, Plain
from lightning_hub.config.recipe import Override, Recipe, Source, build_recipe, recipe_from_text
from lightning_hub.config.resolve import Change, diff, fill_defaults
from lightning_hub.config.safety import ALLOWED_PREFIXES
from lightning_hub.config.schema import SECTIONS, ClassInfo, Option, Schema, shipped_schema
from lightning_hub.config.suggest import nearest
from lightning_hub.config.writing import dump, edit

__all__ = [
    "ALLOWED_PREFIXES",
    "SECTIONS",
    "Change",
    "ClassInfo",
    "Command",
    "KeyPath",
    "Option",
    "Override",
    "Place",
    "Plain",
    "Recipe",
    "RecipeError",
    "Schema",
    "Source",
    "SplitArguments",
    "build_recipe",
    "check",
    "diff",
    "dump",
    "edit",
    "explain_flag",
    "fill_defaults",
    "find_faults",
    "nearest",
    "parse_command",
    "recipe_from_text",
    "shipped_schema",
    "split_arguments",
]
