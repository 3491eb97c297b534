"""The start of an attempt: select the checkpoint to resume from, and write it to the run folder."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from lightning_hub.config.resolved import ResolvedConfig
from lightning_hub.config.yaml_writer import dump
from lightning_hub.errors import ExitCode, HubError, NoCheckpointError
from lightning_hub.launch.orphans import end_orphans
from lightning_hub.runs.files import write_atomic
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.manifest import newest_valid, resolve_checkpoint, step_of
from lightning_hub.runs.writer import RunWriter


@dataclass(frozen=True)
class StartedAttempt:
    """An attempt that has started; every rank has the same one.

    Attributes:
        folder: The run.
        attempt: Its number.
        checkpoint: The checkpoint that it resumes from; None for a first start.
    """

    folder: RunFolder
    attempt: int
    checkpoint: Path | None


def start_attempt(
    run: RunWriter,
    resume: str,
    *,
    config: ResolvedConfig | None = None,
    trusted: bool = False,
    world_size: int = 1,
    master_port: int | None = None,
) -> StartedAttempt:
    """Select the checkpoint, and write that an attempt starts.

    Args:
        run: The run's files; they are closed, with the reason in them, if there is no checkpoint to resume from.
        resume: auto, must, never, or the path of a checkpoint.
        config: The recipe of the attempt; it is written if it differs from that of the run.
        trusted: Whether the path may be a folder without a manifest.
        world_size: Processes of the attempt.
        master_port: Port of the rendezvous, if there are several processes on this machine.

    Raises:
        NoCheckpointError: There is no usable checkpoint, and one is needed.
        ConfigError: The path is not that of a checkpoint.
    """
    try:
        end_orphans(run.folder)
        checkpoint = _select_checkpoint(run, resume, trusted=trusted)
        step = step_of(checkpoint) if checkpoint else 0
        reason = f"resumed from {checkpoint.name}" if checkpoint else "first start"
        attempt = run.start_attempt(
            reason, step=step, checkpoint=checkpoint, world_size=world_size, master_port=master_port
        )
        _write_config(run.folder, attempt, config)
    except Exception as error:
        code = error.exit_code if isinstance(error, HubError) else ExitCode.FAILED
        run.set_status("failed", reason=str(error), exit_code=int(code))
        run.close(int(code))
        raise
    return StartedAttempt(run.folder, attempt, checkpoint)


def _write_config(folder: RunFolder, attempt: int, config: ResolvedConfig | None) -> None:
    """Write the recipe of an attempt: a later attempt starts from it. The first attempt has that of the run."""
    if config is None:
        return
    text = dump(config.tree())
    if attempt > 1 or folder.config.read_text(encoding="utf-8") != text:
        write_atomic(folder.attempt_config(attempt), text.encode(), fsync=True)


def _select_checkpoint(run: RunWriter, resume: str, *, trusted: bool) -> Path | None:
    """Return the checkpoint to resume from; damaged ones are reported and skipped."""
    if resume == "never":
        return None
    if resume not in ("auto", "must"):
        return resolve_checkpoint(resume, trusted=trusted)
    found, damaged = newest_valid(run.folder.checkpoints)
    for error in damaged:
        print(f"warning: {error}; trying an older one", file=sys.stderr)
        run.event("damaged checkpoint", path=error.where, reason=error.message)
    if found is None and (resume == "must" or damaged):
        remedy = "start a new run, or give --resume auto to begin again" if not damaged else "start a new run"
        where = str(run.folder.checkpoints)
        raise NoCheckpointError("there is no checkpoint to resume from", where=where, remedy=remedy)
    return found
