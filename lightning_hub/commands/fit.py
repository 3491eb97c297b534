"""``lightning-hub fit``: train what a recipe describes.

1. Parse the command line, merge the recipe files, check them (``config``).
2. Find out how many processes there are, and which of them this one is (``launch``).
3. Make the run folder, and choose the checkpoint to resume from.
4. Train here, or as a rank of a launcher, or start the ranks of this machine and supervise them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from lightning_hub.commands.recipe_arguments import show_help
from lightning_hub.config.paths import with_absolute_paths
from lightning_hub.config.recipe import Recipe
from lightning_hub.config.resolved import ResolvedConfig
from lightning_hub.config.yaml_writer import dump
from lightning_hub.errors import ExitCode, HubError
from lightning_hub.launch.attempt import StartedAttempt, start_attempt
from lightning_hub.launch.devices import visible_gpus
from lightning_hub.launch.environment import detect_process
from lightning_hub.launch.local import RankGroup, open_listener
from lightning_hub.launch.messages import LOADING, print_note, print_notice
from lightning_hub.launch.options import RunOptions, parse
from lightning_hub.launch.resuming import newest_recipe
from lightning_hub.launch.run_setup import check_and_fill, run_folder, write_run
from lightning_hub.launch.supervisor import rank_command, supervise
from lightning_hub.launch.topology import Topology, resolve_topology
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.terminal import independent_of_terminal
from lightning_hub.runs.writer import RunWriter, StatusWriter


def main(argv: Sequence[str]) -> int:
    """Train, and return the exit code."""
    if show_help("fit", argv):
        return ExitCode.DONE
    command, options, _ = parse("fit", argv)
    config = check_and_fill(command.recipe, options, print_note)
    if options.print_config:
        print(dump(config.tree()), end="")
        return ExitCode.DONE
    return start(command.recipe, config, options)


def start(recipe: Recipe, config: ResolvedConfig, options: RunOptions) -> int:
    """Train in this process, as a rank that a launcher has started, or in ranks that this process starts.

    The training continues when its terminal is closed.

    Args:
        recipe: The recipe as given.
        config: The same, checked, with its defaults.
        options: Where and how.
    """
    with independent_of_terminal():
        kept = _stored(options)
        paths = with_absolute_paths(config.tree(), None if kept is None else kept.tree())
        return _start(recipe, ResolvedConfig.of(paths), options)


def _stored(options: RunOptions) -> ResolvedConfig | None:
    """Return the recipe of the run that is resumed."""
    if options.run_dir is None or options.resume == "never" or not RunFolder(options.run_dir).config.is_file():
        return None
    return newest_recipe(RunFolder(options.run_dir))


def _start(recipe: Recipe, config: ResolvedConfig, options: RunOptions) -> int:
    process = detect_process(os.environ)
    if process is None or (process.rank == 0 and process.launcher != "fit"):  # else the supervisor has printed it
        print_notice(LOADING)
    topology, config = resolve_topology(recipe, config, process, visible_gpus(os.environ), say=print_note)
    if process is None and topology.world_size > 1:
        return _start_ranks(recipe, config, options, topology)
    if process is not None and not process.is_single:
        from lightning_hub.training.worker import run_worker  # 4 s: torch, lightning and transformers

        return run_worker(process, recipe, config, options)
    run = write_run(run_folder(config, options), recipe, config, options)
    begun = start_attempt(run, options.resume, config=config, trusted=options.trust_checkpoint)
    return _run_and_close(run, lambda: train_here(config, begun, run, options))


def train_here(config: ResolvedConfig, begun: StartedAttempt, run: StatusWriter, options: RunOptions) -> int:
    """Train in this process alone."""
    from lightning_hub.training.run import TrainingRun  # 4 s: torch, lightning and transformers

    return TrainingRun(config, begun, run, options=options).fit()


def _start_ranks(recipe: Recipe, config: ResolvedConfig, options: RunOptions, topology: Topology) -> int:
    """Start the ranks on this machine and supervise them."""
    with open_listener() as listener:
        run = write_run(run_folder(config, options), recipe, config, options)
        port = int(listener.getsockname()[1])
        trusted, world_size = options.trust_checkpoint, topology.world_size
        begun = start_attempt(
            run, options.resume, config=config, trusted=trusted, world_size=world_size, master_port=port
        )
        own = begun.folder.attempt_config(begun.attempt)
        written = own if own.is_file() else begun.folder.config
        flags = ["--resume", str(begun.checkpoint)] if begun.checkpoint else []
        argv = rank_command(written, *flags, *options.permissions())
        group = RankGroup(begun.folder, begun.attempt, world_size, argv, listener)
        return _run_and_close(run, lambda: supervise(run, group))


def _run_and_close(run: RunWriter, work: Callable[[], int]) -> int:
    """Do the work of an attempt and close the run."""
    code: int = ExitCode.FAILED
    try:
        code = work()
    except HubError as error:
        code = error.exit_code
        raise
    finally:
        run.close(code)
    return code
