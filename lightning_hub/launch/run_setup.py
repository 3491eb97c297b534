"""Sets up a run: checks the recipe, and makes the run folder or opens it for a new attempt."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from lightning_hub.config.check import check_recipe
from lightning_hub.config.recipe import Recipe
from lightning_hub.config.resolve import fill_defaults
from lightning_hub.config.resolved import ResolvedConfig
from lightning_hub.config.shipped import preset_of
from lightning_hub.config.yaml_writer import dump
from lightning_hub.errors import ConfigError
from lightning_hub.launch.options import RunOptions
from lightning_hub.launch.orphans import end_orphans
from lightning_hub.runs.folder import RunFolder, create_run, lock_run, open_run_dir, runs_root
from lightning_hub.runs.unused import clear_run, holds_unused_run
from lightning_hub.runs.writer import NewRun, RunWriter


def run_folder(config: ResolvedConfig, options: RunOptions) -> RunFolder:
    """Make a new run folder, or open the named one; a run in it that finished no step is replaced."""
    if options.run_dir is not None:
        named = RunFolder(options.run_dir)
        if options.resume == "never" and holds_unused_run(named):
            _clear_unused(named)
            return named
        return open_run_dir(options.run_dir, resume=options.resume != "never")
    if options.resume != "never":
        raise ConfigError(
            f"--resume {options.resume} does not say which run", where="--resume", remedy="give --run-dir as well"
        )
    return create_run(options.run_name or _run_name(config), runs_root(options.runs_root))


def _clear_unused(folder: RunFolder) -> None:
    lock_run(folder)
    end_orphans(folder)
    clear_run(folder)
    print(f"note: {folder.path} held a run in which no step was finished; it is replaced", file=sys.stderr)


def write_run(
    folder: RunFolder, recipe: Recipe, config: ResolvedConfig, options: RunOptions, verdict: str = "single"
) -> RunWriter:
    """Write the files that describe a new run; an existing run is opened without a change.

    Args:
        folder: Where.
        recipe: As given.
        config: The same, checked, with its defaults and its number of processes.
        options: The flags beside it.
        verdict: The launcher, as ``plan.json`` names it.
    """
    if folder.run_json.exists():
        return RunWriter(folder)
    sources = [(source.name, source.text) for source in recipe.sources]
    try:
        return RunWriter.create(folder, _new_run(config, sources, options, verdict))
    except OSError as error:
        remedy = "free some space, or keep runs elsewhere with --runs-root"
        raise ConfigError(
            f"the run folder cannot be written: {error.strerror}", where=str(folder.path), remedy=remedy
        ) from error


def _run_name(config: ResolvedConfig) -> str:
    model = Path(config.model_source or "model").name.lower()
    name = re.sub(r"[^a-z0-9._-]+", "-", f"{config.method}-{model}")
    return name[:64].rstrip("-.")


def _new_run(config: ResolvedConfig, sources: list[tuple[str, str]], options: RunOptions, verdict: str) -> NewRun:
    nnodes, devices = config.trainer.num_nodes, config.trainer.devices
    assert isinstance(devices, list | int), "the topology is resolved"
    nproc_per_node = len(devices) if isinstance(devices, list) else devices
    presets = [preset for name, _ in sources if (preset := preset_of(name)) is not None]
    return NewRun(
        name=_run_name(config),
        method=config.method,
        model=config.model_source,
        config=dump(config.tree()),
        inputs=sources,
        plan={
            "verdict": verdict,
            "nnodes": nnodes,
            "nproc_per_node": nproc_per_node,
            "world_size": nnodes * nproc_per_node,
            "strategy": config.trainer.options["strategy"],
            "nodes": [{"argv": [*sys.argv], "env": {}}],
        },
        nnodes=nnodes,
        nproc_per_node=nproc_per_node,
        preset=presets[0] if presets else None,
        trust_remote_code=options.trust_remote_code,
    )


def check_and_fill(recipe: Recipe, options: RunOptions, say: Callable[[str], None]) -> ResolvedConfig:
    """Check a recipe as far as that is possible without torch, and return it with its defaults.

    Args:
        recipe: The recipe.
        options: What a person allows.
        say: Prints a note about what was understood.

    Raises:
        RecipeError: It has faults, which are all named.
    """
    for sentence in recipe.notes:
        say(sentence)
    check_recipe(recipe, allow_classes=options.allow_class)
    return ResolvedConfig.of(fill_defaults(recipe))
