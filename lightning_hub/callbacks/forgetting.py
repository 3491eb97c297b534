"""Measures the loss on other data during a training, to see what the model forgets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_hub.errors import ConfigError
from lightning_hub.models.pretrained import Pretrained
from lightning_hub.ops.batch import IGNORE_INDEX, PackedSequence, StepBatch
from lightning_hub.parallel.data_parallel import data_parallel


class HasEvalLoaders(Protocol):
    """A data module that can prepare other data in the same way as its own."""

    def eval_loader_for(self, pretrained: Pretrained, paths: str | list[str], where: str) -> Iterable[StepBatch]:
        """Return the packed rows of other data of this rank, each as one step."""


class HasLoss(Protocol):
    """A module that computes the summed loss of the trained tokens of a packed row."""

    model: torch.nn.Module
    loss_head: Callable[[PackedSequence], Tensor]
    pretrained: Pretrained


class Forgetting(Callback):
    """Measures the loss on data of old tasks beside the validation loss, as ``forgetting/NAME``.

    It is measured before the first step, at each validation, and after the last step, over all of the data: the sum
    over its trained tokens divided by their number. Tokenizer, template and length of packed rows are those of the run.

    Args:
        eval_also: Other data by name: a file, folder or hub id, or a list of them.
    """

    def __init__(self, eval_also: dict[str, str | list[str]]) -> None:
        if not eval_also:
            key = "trainer.callbacks.Forgetting.eval_also"
            raise ConfigError("no data is named", where=key, remedy="write NAME: FILE, or remove the callback")
        self.eval_also = eval_also
        self.write: Callable[[int, Mapping[str, float]], None] = lambda step, values: None
        self._steps: dict[str, Iterable[StepBatch]] = {}
        self._last_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepare the data before any weight is loaded."""
        data = cast("HasEvalLoaders", trainer.datamodule)  # type: ignore[attr-defined]  # typed without one
        pretrained = cast("HasLoss", pl_module).pretrained
        for name, paths in self.eval_also.items():
            key = f"trainer.callbacks.Forgetting.eval_also.{name}"
            self._steps[name] = data.eval_loader_for(pretrained, paths, key)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure before the first step, unless a validation has done so."""
        if trainer.global_step == 0 and self._last_step != 0:
            self._measure(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure beside the validation loss."""
        self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure after the last step, unless a validation has done so."""
        if trainer.global_step != self._last_step:
            self._measure(trainer, pl_module)

    @torch.no_grad()
    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast("HasLoss", pl_module)
        modes = {submodule: submodule.training for submodule in module.model.modules()}
        module.model.eval()
        found = {f"forgetting/{name}": self._loss(trainer, pl_module, steps) for name, steps in self._steps.items()}
        for submodule, training in modes.items():
            submodule.training = training
        self._last_step = trainer.global_step
        trainer.callback_metrics.update({name: torch.tensor(loss) for name, loss in found.items()})
        for logger in trainer.loggers:
            logger.log_metrics(found, step=trainer.global_step)
        self.write(trainer.global_step, found)

    @staticmethod
    def _loss(trainer: Trainer, pl_module: LightningModule, steps: Iterable[StepBatch]) -> float:
        """Return the loss per trained token over all ranks: two sums, one division."""
        sums = torch.zeros(2, dtype=torch.float64, device=pl_module.device)
        with trainer.precision_plugin.val_step_context():
            for step in steps:
                for row in trainer.strategy.batch_to_device(step).rows:
                    sums[0] += cast("HasLoss", pl_module).loss_head(row)
                    sums[1] += (row.labels != IGNORE_INDEX).sum()
        total, count = data_parallel(trainer.strategy).sum(sums).tolist()
        return float(total / max(1.0, count))
