"""The progress bar: step, loss, tokens per second, remaining time."""

from __future__ import annotations

import time
from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import MofNCompleteColumn, TextColumn

from lightning_hub.callbacks.recorder import HasStepMetrics, Recorder
from lightning_hub.ops.batch import StepBatch
from lightning_hub.progress_bar import SECONDS_BETWEEN_LINES, ProgressBar

SECONDS_BETWEEN_LOSSES = 0.5
"""How often the loss is read from the device, in seconds: the host waits for the device each time."""


class ProgressLine(Callback):
    """Draws a bar on a terminal; without a terminal it prints a line every ten seconds.

    Args:
        recorder: It counts the tokens, from which the speed is computed.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._bar: ProgressBar | None = None
        self._printed = 0.0
        self._seen = (0, time.monotonic())
        self._speed = 0.0
        self._loss = ""
        self._loss_at = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar."""
        if not trainer.is_global_zero:
            return
        self._printed = time.monotonic()
        self._seen = (self.recorder.tokens, time.monotonic())
        columns = (MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"))
        self._bar = ProgressBar("step", _total(trainer), *columns, completed=trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: StepBatch, batch_idx: int
    ) -> None:
        """Update the bar, or print a line if it is due."""
        if self._bar is None:
            return
        if self._bar.is_drawn:
            self._bar.update(trainer.global_step, self._numbers(pl_module))
        elif time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            total = _total(trainer)
            print(f"step {trainer.global_step}{f'/{total}' if total else ''} {self._numbers(pl_module)}", flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the bar."""
        self._finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop the bar, so that the error is printed below it."""
        self._finish()

    def _finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _numbers(self, module: LightningModule) -> str:
        tokens, since = self._seen
        now = time.monotonic()
        if now - since >= 1.0:
            self._speed = (self.recorder.tokens - tokens) / (now - since)
            self._seen = (self.recorder.tokens, now)
        if now - self._loss_at >= SECONDS_BETWEEN_LOSSES:
            self._loss, self._loss_at = f"{float(cast('HasStepMetrics', module).step_loss):.4f}", now
        return f"loss {self._loss}  {self._speed:,.0f} tok/s"


def _total(trainer: Trainer) -> int | None:
    total = trainer.estimated_stepping_batches
    return None if total == float("inf") else int(total)
