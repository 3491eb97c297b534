"""A callback that notes when steps end, for runs that are measured from outside."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import TypedDict, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_hub.callbacks.recorder import HasStepMetrics


class Notes(TypedDict):
    """What a clock writes: for each step its loss and its end, by both times, and the process's peak memory."""

    losses: list[float]
    wall: list[float]
    cpu: list[float]
    peak_mib: int


class Clock(Callback):
    """Notes wall time, CPU time of the process and the loss at the end of each step.

    It stands before the trainer's other callbacks, so that what they do is part of the following step.

    Args:
        path: Where the notes are written when training ends.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Note the end of a step."""
        self.mark(float(cast("HasStepMetrics", pl_module).step_loss))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the notes."""
        self.write()

    def mark(self, loss: float) -> None:
        """Note that a step with this loss has just ended."""
        self.losses.append(loss)
        self.wall.append(time.time())
        self.cpu.append(time.process_time())

    def write(self) -> None:
        """Write the notes as JSON."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        notes = Notes(losses=self.losses, wall=self.wall, cpu=self.cpu, peak_mib=round(peak))
        Path(self.path).write_text(json.dumps(notes), encoding="utf-8")
