"""What the verbs that take a recipe have in common: their help, and the process that they run in."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lightning_hub.config.help import class_help, recipe_help
from lightning_hub.config.recipe import Recipe
from lightning_hub.config.resolved import ResolvedConfig
from lightning_hub.launch.devices import visible_gpus
from lightning_hub.launch.environment import ProcessInfo, detect_process
from lightning_hub.launch.options import FLAGS
from lightning_hub.launch.topology import resolve_topology, single_process


def show_help(verb: str, argv: Sequence[str], extra: Sequence[tuple[str, str]] = ()) -> bool:
    """Print the help of the command, or of a class (``--model.help SFT``), if it is asked for."""
    text = class_help(argv)
    if text is None and {"-h", "--help"} & set(argv):
        text = recipe_help(verb, (*FLAGS, *extra))
    if text is not None:
        print(text)
    return text is not None


def resolve_process(recipe: Recipe, config: ResolvedConfig) -> tuple[ProcessInfo, ResolvedConfig]:
    """Return the process of a verb that trains nothing, and its config.

    It is one of those that a launcher has started, or a single one.
    """
    process = detect_process(os.environ)
    if process is None or process.is_single:
        return ProcessInfo(), single_process(config)
    _, config = resolve_topology(recipe, config, process, visible_gpus(os.environ))
    return process, config
