"""When a run's state is saved, and in which form: one that always means "n steps are finished"."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_hub.checkpoints.rng import random_state, restore_random_state
from lightning_hub.checkpoints.settings import CheckpointSettings
from lightning_hub.checkpoints.storage import point_latest, prune, retire
from lightning_hub.errors import ConfigError, ExitCode, HubError
from lightning_hub.runs.manifest import committed

Wish: TypeAlias = Literal["checkpoint", "stop"] | None


class StopRun(HubError):  # no fault: somebody asked for it
    """The run was asked to stop, and has saved its state."""

    exit_code = ExitCode.STOPPED
    kind = "signal"
    label = "stopped"


class SaveCheckpoints(Checkpoint):
    """Saves at step boundaries only, and never between a step and the validation that belongs to it.

    Lightning can stop and go on in the middle of a validation, with a different state for each place. Ours has one:
    n steps are finished, and validated where that was due. A resumed run needs no other case, which is what makes
    it exact.

    Args:
        settings: When to save and what to keep.
        folder: The run's folder of checkpoints.
        facts: What a resume compares with, filled in when the data is known.
        wish: What somebody asks for now: a checkpoint, a stop after a checkpoint, or nothing.
        saved: Told the step and path of every committed checkpoint.
    """

    def __init__(
        self,
        settings: CheckpointSettings,
        folder: Path,
        facts: dict[str, str],
        wish: Callable[[], Wish],
        saved: Callable[[int, Path], None],
    ) -> None:
        self.settings = settings
        self.folder = folder
        self.facts = facts
        self.wish = wish
        self.saved = saved
        self._stopping = False
        self._due = False
        self._saved_step = -1
        self._saved_at = time.monotonic()
        self._scores: dict[int, float] = {}
        self._resumed_random_state: dict[str, Any] | None = None
        self._resumed_facts: dict[str, str] = {}

    # ---- when ------------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Save if it is time, unless a validation comes first."""
        settings, step = self.settings, trainer.global_step
        minutes = (time.monotonic() - self._saved_at) / 60
        self._due = (
            self._due
            or bool(settings.every_n_steps and step % settings.every_n_steps == 0)
            or bool(settings.every_minutes and minutes >= settings.every_minutes)
        )
        wish = self.wish()
        self._stopping = wish == "stop"
        self._due = self._due or wish is not None
        fetcher = trainer.fit_loop._data_fetcher
        if self._due and fetcher is not None and not trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what waited for the validation, and what the validation found to be among the best."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        best = self.settings.best
        score = trainer.callback_metrics.get(best.metric) if best else None
        if best is not None and score is not None:
            self._scores[trainer.global_step] = float(score)
            self._due = self._due or trainer.global_step in self._best_steps()
        if self._due:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of the epoch, and at the end of the run."""
        epochs = self.settings.every_n_epochs
        done, steps = trainer.current_epoch + 1, trainer.max_steps
        last = trainer.should_stop or done == trainer.max_epochs or 0 <= steps <= trainer.global_step
        if last or (epochs and done % epochs == 0):
            self.save(trainer)

    # ---- what ------------------------------------------------------------------------------------------------------

    def save(self, trainer: Trainer) -> None:
        """Commit a checkpoint of this step, make it the latest, and remove what need not be kept."""
        step = trainer.global_step
        if step == self._saved_step:
            return
        target = self.folder / f"step-{step}"
        if trainer.is_global_zero:
            retire(target)  # an earlier attempt came this far, and this one began before it
        trainer.save_checkpoint(target)
        self._saved_step, self._saved_at, self._due = step, time.monotonic(), False
        if trainer.is_global_zero:
            point_latest(target)
            self.saved(step, target)
            # Later steps are of an attempt that this one did not go on from: they are given up, not counted as newest.
            newest = [path for saved, path in committed(self.folder) if saved <= step][: self.settings.keep]
            prune(self.folder, {*newest, *(self.folder / f"step-{best}" for best in self._best_steps())})
        if self._stopping:
            remedy = f"go on with: lightning-hub runs resume {self.folder.parent}"
            raise StopRun(f"on request, after step {step}; its checkpoint is {target}", remedy=remedy)

    def _best_steps(self) -> list[int]:
        best = self.settings.best
        if best is None:
            return []
        return sorted(self._scores, key=lambda step: self._scores[step], reverse=best.mode == "max")[: best.keep]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what a resume of this run must find unchanged."""
        data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning types its trainer without one
        self.facts.update(data.facts())
        self._refuse_changes()

    def _refuse_changes(self) -> None:
        for name, before in self._resumed_facts.items():
            if before != self.facts.get(name, before):
                raise ConfigError(
                    f"{name} has changed since the checkpoint: it was {before} and is {self.facts[name]}",
                    where="--resume",
                    remedy="go on with the same data and batch settings, or start a new run",
                )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Bring the loops into their one form, and add the random state."""
        checkpoint["loops"]["fit_loop"].update(_finished_steps(trainer, checkpoint["loops"]["fit_loop"]))
        checkpoint["random_state"] = random_state()
        checkpoint["facts"] = dict(self.facts)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the random state until training starts: set-up draws random numbers of its own."""
        self._resumed_random_state = checkpoint["random_state"]
        self._resumed_facts = dict(checkpoint["facts"])
        self._saved_step = checkpoint["global_step"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the random numbers where the checkpoint left off."""
        if self._resumed_random_state is not None:
            restore_random_state(self._resumed_random_state)
            self._resumed_random_state = None

    def state_dict(self) -> dict[str, Any]:
        """Return the scores of the best checkpoints."""
        return {"scores": torch.tensor([list(pair) for pair in self._scores.items()], dtype=torch.float64)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the scores of the best checkpoints."""
        self._scores = {int(step): score for step, score in state_dict["scores"].tolist()}


def _finished_steps(trainer: Trainer, saved: dict[str, Any]) -> dict[str, Any]:
    """Return the progress of the loops as if exactly the finished steps had been counted and nothing begun.

    Whichever hook a checkpoint is saved from, Lightning's counters differ by what this hook stands between; its
    restart logic has a stage for each. The form here is the one it calls "restarted on last".
    """
    epoch, length = trainer.current_epoch, int(trainer.num_training_batches)
    done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    if done >= length:
        epoch, done = epoch + 1, 0
    started = epoch + (1 if done else 0)
    epochs = {"ready": started, "started": started, "processed": epoch, "completed": epoch}
    batches = dict.fromkeys(("ready", "started", "processed", "completed"))
    return {
        "epoch_progress": {"total": epochs, "current": epochs},
        "epoch_loop.batch_progress": {
            "total": dict.fromkeys(batches, epoch * length + done),
            "current": dict.fromkeys(batches, done),
            "is_last_batch": False,
        },
        "state_dict": {},
        "epoch_loop.state_dict": {"_batches_that_stepped": trainer.global_step},
    } | {key: value for key, value in saved.items() if key.startswith("epoch_loop.automatic_optimization")}
