"""What a new attempt of a run starts from: the newest recipe, and whether work is left."""

from __future__ import annotations

from pathlib import Path

from lightning_hub.config.recipe import recipe_from_text
from lightning_hub.config.resolve import fill_defaults
from lightning_hub.config.resolved import ResolvedConfig, TrainerConfig
from lightning_hub.errors import ConfigError
from lightning_hub.runs.files import Json, read_json
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.manifest import newest_valid, step_of
from lightning_hub.runs.metrics import read_metrics
from lightning_hub.runs.records import Attempt, ErrorRecord, Status


def newest_config(folder: RunFolder) -> Path:
    """Return the recipe file of the newest attempt that was not refused."""
    for attempt in reversed(folder.attempts()):
        path = folder.attempt_config(attempt)
        if path.is_file() and not _was_refused(folder, attempt):
            return path
    return folder.config


def newest_recipe(folder: RunFolder) -> ResolvedConfig:
    """Return the recipe of the newest attempt, with its defaults."""
    config = newest_config(folder)
    return ResolvedConfig.of(fill_defaults(recipe_from_text(config.read_text(encoding="utf-8"), str(config))))


def _was_refused(folder: RunFolder, attempt: int) -> bool:
    """Return whether an attempt ended before its first step because of its recipe or data."""
    began = Attempt.from_json(read_json(folder.attempt_json(attempt)))
    found = (read_json(folder.rank(attempt, rank).error) for rank in folder.ranks(attempt))
    errors = [ErrorRecord.from_json(data) for data in found if data is not None]
    return any(error.kind in ("config", "data") and error.step <= began.step for error in errors)


def check_work_left(folder: RunFolder, config: ResolvedConfig) -> None:
    """Refuse to resume a run that has reached its limits.

    Args:
        folder: The run.
        config: The recipe of the new attempt.

    Raises:
        ConfigError: No work is left; the error says which limit to raise.
    """
    status = Status.from_json(read_json(folder.status))
    if status.state != "finished":
        return
    before, after = newest_recipe(folder).trainer, config.trainer
    epochs = _epochs_begun(folder, status.step)
    if _same_limits(before, after) or not _is_further(before, after, status.step, epochs):
        found, _ = newest_valid(folder.checkpoints)
        if found is not None and step_of(found) >= status.step:
            raise _finished(folder, before, after, status.step, epochs)


def _same_limits(before: TrainerConfig, after: TrainerConfig) -> bool:
    return before.limits == after.limits


def _is_further(before: TrainerConfig, after: TrainerConfig, step: int, epochs: int) -> bool:
    """Return whether new limits are beyond what is done."""
    if 0 <= (after.options.get("max_steps") or -1) <= step:
        return False
    ended_by_steps = (before.options.get("max_steps") or -1) == step
    limit = after.options.get("max_epochs")
    begun = epochs - 1 if ended_by_steps else epochs  # its last epoch may not be complete
    return limit in (None, -1) or int(limit) > begun


def _epochs_begun(folder: RunFolder, step: int) -> int:
    told: list[Json] = [line.get("epoch") for line in read_metrics(folder)]
    for attempt in folder.attempts()[-1:]:
        beat = read_json(folder.rank(attempt, 0).heartbeat) or {}
        told += [beat.get("epoch")] if beat.get("step") == step else []
    return max((epoch for epoch in told if isinstance(epoch, int)), default=-1) + 1


def _finished(folder: RunFolder, before: TrainerConfig, after: TrainerConfig, step: int, epochs: int) -> ConfigError:
    by_steps = (before.options.get("max_steps") or -1) == step
    done = (
        f"{step} steps" if by_steps else f"{epochs} epochs ({step} steps)" if epochs != 1 else f"1 epoch ({step} steps)"
    )
    flag, more = ("max_steps", 2 * step) if by_steps else ("max_epochs", epochs + 1)
    given = "" if _same_limits(before, after) else ", which reach the limits that are given"
    remedy = f"to train on, give a limit beyond that: lightning-hub runs resume {folder.id} --trainer.{flag} {more}"
    if not folder.export.is_dir():
        remedy += f"; its export is missing: lightning-hub export {folder.id}"
    return ConfigError(f"{folder.id} is finished, after {done}{given}", where="RUN", remedy=remedy)
