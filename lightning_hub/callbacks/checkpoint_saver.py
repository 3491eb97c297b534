"""Saves checkpoints: a checkpoint always means that n steps are finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch.optim.lr_scheduler import LambdaLR

from lightning_hub.checkpoints import state_dict
from lightning_hub.checkpoints.async_saver import AsyncSaver
from lightning_hub.checkpoints.checkpoint_io import FolderCheckpointIO
from lightning_hub.checkpoints.resume_check import check_resume
from lightning_hub.checkpoints.rng import random_state
from lightning_hub.checkpoints.settings import CheckpointSettings
from lightning_hub.checkpoints.storage import point_latest, prune
from lightning_hub.errors import ConfigError, ExitCode, HubError
from lightning_hub.parallel.collectives import Ranks
from lightning_hub.parallel.data_parallel import data_parallel, strategy_name
from lightning_hub.parallel.lightning_internals import is_validation_next, progress_of_finished_steps
from lightning_hub.runs.folder import checkpoint_name
from lightning_hub.runs.manifest import list_checkpoints

SaveRequest: TypeAlias = Literal["checkpoint", "stop"] | None


class StopRun(HubError):  # not a fault: a person or program asked for it
    """The run has stopped on request, and has saved a checkpoint."""

    exit_code = ExitCode.STOPPED
    kind = "signal"
    label = "stopped"


class CheckpointSaver(Checkpoint):
    """Saves checkpoints after a step, and never between a step and a validation that follows it.

    Lightning can also save and resume in the middle of a validation, with other loop counters. Here there is one state
    only: n steps are finished, and the validation after them too. A resume has no other case, so it can be exact.

    Args:
        settings: When to save and what to keep.
        folder: The folder of the checkpoints of the run.
        facts: Facts for the comparison at a resume; those of the data are added later.
        request: Returns the current request: a checkpoint, a stop after a checkpoint, or None.
        on_saved: Called with the step and path of every committed checkpoint (rank 0).
        allow_changed_data: Whether a resume may find other data or batch settings.
    """

    def __init__(
        self,
        settings: CheckpointSettings,
        folder: Path,
        facts: dict[str, str],
        request: Callable[[], SaveRequest],
        on_saved: Callable[[int, Path], None],
        *,
        allow_changed_data: bool = False,
    ) -> None:
        self.settings = settings
        self.folder = folder
        self.facts = facts
        self.request = request
        self.on_saved = on_saved
        self.allow_changed_data = allow_changed_data
        self._stopping = False
        self._is_due = False
        self._saved_step = -1
        self._saved_at = time.monotonic()
        self._scores: dict[int, float] = {}
        self._resumed: dict[str, Any] | None = None
        self._background = AsyncSaver() if settings.asynchronous else None
        self._unpublished: tuple[int, Path] | None = None

    # ---- when ------------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Save if a checkpoint is due, unless a validation follows."""
        self._publish(wait=False)
        settings, step = self.settings, trainer.global_step
        minutes = (time.monotonic() - self._saved_at) / 60
        self._is_due = (
            self._is_due
            or bool(settings.every_n_steps and step % settings.every_n_steps == 0)
            or bool(settings.every_minutes and minutes >= settings.every_minutes)
        )
        request = self.request()
        self._stopping = request == "stop"
        self._is_due = self._is_due or request is not None
        if self._is_due and not is_validation_next(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if a checkpoint is due, or if this step is one of the best by its metric."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        best = self.settings.best
        score = trainer.callback_metrics.get(best.metric) if best else None
        if best is not None and score is not None:
            self._scores[trainer.global_step] = float(score)
            self._is_due = self._is_due or trainer.global_step in self._best_steps()
        if self._is_due:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of the epoch if this is due, and always at the end of the run."""
        epochs = self.settings.every_n_epochs
        done, steps = trainer.current_epoch + 1, trainer.max_steps
        last = trainer.should_stop or done == trainer.max_epochs or 0 <= steps <= trainer.global_step
        if last or (epochs and done % epochs == 0):
            self.save(trainer)

    # ---- what ------------------------------------------------------------------------------------------------------

    def save(self, trainer: Trainer) -> None:
        """Commit a checkpoint of this step, make it the latest, and delete old ones.

        With asynchronous saves only the copy to the host happens now; a stop and the next save wait for the rest.
        """
        step = trainer.global_step
        if step != self._saved_step:
            self._publish(wait=True)
            target = self.folder / checkpoint_name(step)
            with self._in_background(trainer.strategy.checkpoint_io):
                trainer.save_checkpoint(target)
            self._saved_step, self._saved_at, self._is_due = step, time.monotonic(), False
            self._unpublished = step, target
            self._publish(wait=self._background is None or self._stopping)
            if self._stopping:
                remedy = f"resume with: lightning-hub runs resume {self.folder.parent}"
                raise StopRun(f"on request, after step {step}; its checkpoint is {target}", remedy=remedy)

    @contextmanager
    def _in_background(self, checkpoint_io: CheckpointIO) -> Iterator[None]:
        """Set the asynchronous saver for the saves of this callback; saves of other callbacks stay synchronous."""
        if not isinstance(checkpoint_io, FolderCheckpointIO):
            yield
            return
        checkpoint_io.background = self._background
        try:
            yield
        finally:
            checkpoint_io.background = None

    def _publish(self, *, wait: bool) -> None:
        """When the last save is complete on every rank, make it the latest checkpoint.

        Raises:
            Exception: The error of the save, the same on every rank.
        """
        if self._unpublished is None or not (self._background is None or self._background.ended(wait=wait)):
            return
        step, target = self._unpublished
        self._unpublished = None
        Ranks().run_on_rank_zero(lambda: self._committed(step, target))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the last save."""
        self._publish(wait=True)

    def _committed(self, step: int, target: Path) -> None:
        """Make a committed checkpoint the latest, call ``on_saved``, and delete old checkpoints."""
        point_latest(target)
        self.on_saved(step, target)
        # Checkpoints of later steps are from an attempt from which this one did not resume: they are deleted.
        newest = [path for saved, path in list_checkpoints(self.folder) if saved <= step][: self.settings.keep]
        prune(self.folder, {*newest, *(self.folder / checkpoint_name(best) for best in self._best_steps())})

    def _best_steps(self) -> list[int]:
        best = self.settings.best
        if best is None:
            return []
        return sorted(self._scores, key=lambda step: self._scores[step], reverse=best.mode == "max")[: best.keep]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Change the checkpoint to a form from which any topology can resume.

        It has the shards of this rank by the names of the tensors, the progress of the loops in one form, and of the
        schedule only the step.
        """
        checkpoint["loops"]["fit_loop"].update(progress_of_finished_steps(trainer, checkpoint["loops"]["fit_loop"]))
        checkpoint["state_dict"] = state_dict.weights(pl_module)
        checkpoint["optimizer_states"] = state_dict.optimizer_state(pl_module, trainer.optimizers)
        checkpoint["lr_schedulers"] = []
        checkpoint["schedule_steps"] = [config.scheduler.last_epoch for config in trainer.lr_scheduler_configs]
        checkpoint["random_state"] = (data_parallel(trainer.strategy).rank, random_state())
        checkpoint["world_size"], checkpoint["strategy"] = trainer.world_size, strategy_name(trainer.strategy)
        checkpoint["facts"] = dict(self.facts)

    # ---- resume ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Switch strict loading off: weights are loaded in place by this callback, not by Lightning."""
        pl_module.strict_loading = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Load the weights, and keep the rest until the optimizer exists and training starts."""
        if "facts" not in checkpoint:
            raise ConfigError(
                "this checkpoint has weights only", where="--resume", remedy="resume from a full checkpoint"
            )
        state_dict.load_weights(pl_module, checkpoint["restored"].weights)
        self._resumed = checkpoint
        self._saved_step = checkpoint["global_step"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the facts of the data, compare them with the checkpoint, and load the state of the optimizer."""
        must_match = trainer.datamodule.facts()  # type: ignore[attr-defined]  # Lightning types its trainer without one
        self.facts.update(must_match)
        self.facts["processes"] = f"{trainer.world_size} ({strategy_name(trainer.strategy)})"
        if self._resumed is None:
            return
        check_resume(
            self._resumed["facts"],
            self.facts,
            must_match,
            allowed=self.allow_changed_data,
            speak=trainer.is_global_zero,
        )
        for optimizer in trainer.optimizers:
            state_dict.load_optimizer_state(pl_module, optimizer, self._resumed["restored"].optimizer)
        for config, step in zip(trainer.lr_scheduler_configs, self._resumed["schedule_steps"], strict=True):
            assert isinstance(config.scheduler, LambdaLR), "learning rates are a function of the step"
            state_dict.set_scheduler_step(config.scheduler, step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the random state last, because the set-up draws random numbers too."""
        if self._resumed is not None:
            self._resumed["restored"].restore_random(data_parallel(trainer.strategy).rank)
            self._resumed = None

    def state_dict(self) -> dict[str, Any]:
        """Return the scores of the best checkpoints."""
        return {"scores": torch.tensor([list(pair) for pair in self._scores.items()], dtype=torch.float64)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the scores of the best checkpoints."""
        self._scores = {int(step): score for step, score in state_dict["scores"].tolist()}
