"""A callback that stops a run with SIGTERM."""

from __future__ import annotations

import os
import signal

from lightning.pytorch import Callback, LightningModule, Trainer


class StopAfter(Callback):
    """Sends SIGTERM to this process once, after a given step.

    Args:
        step: Number of finished optimizer steps after which the run saves a checkpoint and stops.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Send the signal after the step; a run that resumes from this step gets no signal."""
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
