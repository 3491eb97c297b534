"""One rank: initialise the process group, train, destroy the group."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from lightning_hub.config.recipe import Recipe
from lightning_hub.config.resolved import ResolvedConfig
from lightning_hub.errors import ExitCode, HubError, first_line, is_disk_trouble
from lightning_hub.launch.attempt import StartedAttempt, start_attempt
from lightning_hub.launch.devices import visible_gpus
from lightning_hub.launch.environment import ProcessInfo
from lightning_hub.launch.options import RunOptions
from lightning_hub.launch.run_setup import run_folder, write_run
from lightning_hub.launch.topology import mesh_of, uses_gpus
from lightning_hub.models.pretrained import Pretrained
from lightning_hub.parallel.collectives import Ranks
from lightning_hub.parallel.process_group import HubClusterEnvironment, destroy_process_group, init_process_group
from lightning_hub.parallel.tensor_parallel import check_model
from lightning_hub.parent import die_with_parent
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.rank_writer import RankWriter, classify
from lightning_hub.runs.writer import RunWriter, StatusWriter
from lightning_hub.training.run import TrainingRun


def run_worker(process: ProcessInfo, recipe: Recipe, config: ResolvedConfig, options: RunOptions) -> int:
    """Train as one rank, and end the process.

    If this package has started the ranks, their supervisor writes the run folder; else rank 0 does.
    """
    if process.launcher in ("fit", "torchrun"):  # its agent or supervisor ends the ranks, but only while it runs
        die_with_parent()
    try:
        with process_group(process, config) as environment:
            if process.run_dir is not None:
                begun, status = _attempt_from_supervisor(process, options)
                code = _train(config, begun, status, environment, options)
            else:
                code = _train_as_owner(process, recipe, config, options, environment)
        atexit._run_exitfuncs()
    except HubError as error:
        _record_error(process, error)
        print(f"{error.label}: {error}", file=sys.stderr)
        code = int(error.exit_code)
    except Exception as error:
        _record_error(process, error)
        if classify(error) == "comm":
            print(f"error: lost another rank: {first_line(error)}", file=sys.stderr)
        elif is_disk_trouble(error):
            print(f"error: cannot write to the disk: {error}; free some space", file=sys.stderr)
        else:
            traceback.print_exc()
        code = int(ExitCode.FAILED)
    return _hard_exit(code)


@contextmanager
def process_group(process: ProcessInfo, config: ResolvedConfig) -> Iterator[HubClusterEnvironment | None]:
    """Initialise the process group, and destroy it after the block; a single process gets None.

    Raises:
        ConfigError: The strategy cannot shard the model; found before the rendezvous, so that no rank waits.
    """
    if process.is_single:
        yield None
        return
    mesh = mesh_of(config.trainer.strategy, process.world_size)
    if mesh is not None and mesh.tp > 1:
        check_model(Pretrained(config.model_source).config, mesh.tp)
    yield init_process_group(process, on_gpu=uses_gpus(config.trainer, visible_gpus(os.environ)))
    destroy_process_group()


def _attempt_from_supervisor(process: ProcessInfo, options: RunOptions) -> tuple[StartedAttempt, StatusWriter | None]:
    assert process.run_dir is not None, "a supervisor of ours has started this rank"
    folder = RunFolder(process.run_dir)
    checkpoint = None if options.resume == "never" else Path(options.resume)
    return StartedAttempt(folder, process.attempt, checkpoint), StatusWriter(folder) if process.rank == 0 else None


def _train_as_owner(
    process: ProcessInfo,
    recipe: Recipe,
    config: ResolvedConfig,
    options: RunOptions,
    environment: HubClusterEnvironment | None,
) -> int:
    """Train under another launcher: rank 0 makes the run folder and broadcasts it."""
    kept: list[RunWriter] = []

    def make() -> StartedAttempt:
        kept.append(write_run(run_folder(config, options), recipe, config, options, process.launcher))
        return start_attempt(
            kept[0], options.resume, config=config, trusted=options.trust_checkpoint, world_size=process.world_size
        )

    begun = Ranks().run_on_rank_zero(make)
    code: int = ExitCode.FAILED
    try:
        code = _train(config, begun, kept[0] if kept else None, environment, options)
    except HubError as error:
        code = error.exit_code
        raise
    finally:
        for run in kept:
            run.close(code)
    return code


def _train(
    config: ResolvedConfig,
    begun: StartedAttempt,
    status: StatusWriter | None,
    environment: HubClusterEnvironment | None,
    options: RunOptions,
) -> int:
    return TrainingRun(config, begun, status, environment=environment, options=options).fit()


def _record_error(process: ProcessInfo, error: Exception) -> None:
    """Write the error of a rank that failed before its `TrainingRun` existed."""
    if process.run_dir is None or getattr(error, "exit_code", None) == ExitCode.STOPPED:
        return
    writer = RankWriter(RunFolder(process.run_dir), process.attempt, rank=process.rank, world_size=process.world_size)
    if not writer.files.error.exists():
        writer.record_error(error)


def _hard_exit(code: int) -> NoReturn:
    """End at once: threads of the process group can wait for ranks that have ended, or abort a normal exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
