"""A callback that stops a run as a person would."""

from __future__ import annotations

import os
import signal

from lightning.pytorch import Callback, LightningModule, Trainer


class StopAfter(Callback):
    """Sends this process the signal of a polite end once, after a given step.

    Args:
        step: Finished optimizer steps after which the run is asked to save and stop.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Ask after the step; a run that goes on from it is left alone."""
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
