"""The recorder: writes metrics, heartbeat and events of a training, without delaying the steps."""

from __future__ import annotations

import time
from typing import Any, Protocol, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lightning_hub.callbacks.flops import FlopsCounter, peak_flops
from lightning_hub.callbacks.forgetting import Forgetting
from lightning_hub.errors import HubError, first_line
from lightning_hub.ops.batch import StepBatch
from lightning_hub.parallel.collectives import max_with_rank
from lightning_hub.parallel.data_parallel import data_parallel
from lightning_hub.parallel.lightning_internals import is_last_step
from lightning_hub.runs.rank_writer import RankWriter, classify
from lightning_hub.runs.timings import PhaseName
from lightning_hub.runs.writer import StatusWriter


class HasStepMetrics(Protocol):
    """The attributes of a module that the recorder reads after a step."""

    step_loss: Tensor
    grad_norm: Tensor
    is_skipped: bool


class OutOfMemoryError(HubError):
    """The memory of a device or host was not enough for a step."""

    kind = "oom"

    def __init__(self, step: int, batch: StepBatch, cause: BaseException) -> None:
        lengths = ", ".join(str(row.input_ids.numel()) for row in batch.rows)
        reason = first_line(cause)
        super().__init__(
            f"no memory was left in step {step}, whose packed rows on this rank have {lengths} tokens ({reason[:200]})",
            remedy="lower data.init_args.max_tokens_per_gpu, set model.init_args.gradient_checkpointing, or shard over "
            "more devices with strategy fsdp",
        )


class Recorder(Callback):
    """Updates the heartbeat, writes metrics, and gives them to the loggers and callbacks of Lightning.

    Values stay on the device until a step is logged, so the host does not wait for the device in between.

    Args:
        rank: The files of this rank.
        run: The writer of the status of the run (rank 0 only).
    """

    def __init__(self, rank: RankWriter, run: StatusWriter | None) -> None:
        self.rank = rank
        self.run = run
        self.activity = rank.activity
        self.timer = rank.timer
        self._flops: FlopsCounter | None = None
        self._peak_flops: float | None = None
        self._interval_flops = 0.0
        self._before_validation: PhaseName = "setup"
        self.tokens = 0
        self.loss_tokens = 0
        self._lr = 0.0
        self._batch: StepBatch | None = None
        self._positions_of_steps: dict[int, tuple[int, int]] = {}
        self.val_losses: dict[int, float] = {}
        self._interval_tokens = 0
        self._interval_steps = 0
        self._since = time.perf_counter()

    # ---- begin and end -----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Connect callbacks with their own metrics to the metrics file; the data is prepared by now."""
        self.timer.enter("model")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning's connector
            if isinstance(callback, Forgetting) and self.run is not None:
                callback.write = self.rank.log

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the data report before the first step; the model is loaded by now."""
        self.timer.enter("setup")
        if self.run is None:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning types its trainer without one
        data.prepared.write_report(self.run.folder.data_report, packing=data.packing_report())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write that the training runs, and its number of steps."""
        self.activity.phase, self.activity.step = "train", trainer.global_step
        if self.run is not None:
            total = trainer.estimated_stepping_batches
            steps = int(total) if total != float("inf") else None
            self.run.set_status("running", step=trainer.global_step, max_steps=steps)
        self._count_flops(trainer, pl_module)
        self.timer.enter("first step")
        self._restart_interval()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the training phase."""
        self.activity.phase = "exit"
        self.timer.enter("teardown")

    def _count_flops(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the operations of a step, if the peak of the device is known."""
        peak = peak_flops(pl_module.device) if "16" in str(trainer.precision) else None
        model = getattr(pl_module, "model", None)
        if peak is not None and isinstance(model, PreTrainedModel):
            self._flops, self._peak_flops = FlopsCounter.of(model), peak * trainer.world_size

    # ---- steps -------------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: StepBatch, batch_idx: int
    ) -> None:
        """Record the start of a step; the time of a save before it does not count as training time."""
        if self.activity.phase == "save":
            self._since += time.monotonic() - self.activity.doing_since
            self.timer.enter("steps")
        self.activity.phase = "train"
        self.activity.begin("forward")
        self._batch = batch
        step = trainer.global_step + 1
        self._positions_of_steps = {
            step: (trainer.current_epoch, batch_idx),
            step - 1: self._positions_of_steps.get(step - 1, (0, 0)),
        }

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Record the start of a backward."""
        self.activity.begin("backward")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Record the start of the optimizer step, and its learning rate."""
        self.activity.begin("optimizer")
        self._lr = float(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: StepBatch, batch_idx: int
    ) -> None:
        """Count the step, and log it if this is due."""
        step = trainer.global_step
        if self.timer.phase == "first step":
            self.timer.enter("steps")
        self.activity.step, self.activity.epoch = step, trainer.current_epoch
        if cast("HasStepMetrics", pl_module).is_skipped:
            self._note_samples(trainer, step, "skipped")
        self.tokens += batch.num_tokens
        self.loss_tokens += batch.num_trained
        self._interval_tokens += batch.num_tokens
        self._interval_steps += 1
        if self._flops is not None:
            self._interval_flops += self._flops.of_step(batch, data_parallel(trainer.strategy).size)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning's connector
        last = is_last_step(trainer)
        if (every and step % every == 0) or last or step == 1:
            self._log_step(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Record the samples of a step that is not finite, and describe a step that ran out of memory.

        Raises:
            OutOfMemoryError: In place of an error of torch, which names only bytes.
        """
        if self._batch is not None and classify(exception) == "oom":
            raise OutOfMemoryError(trainer.global_step + 1, self._batch, exception) from exception
        if isinstance(exception, HubError) and exception.kind == "nan":
            self._note_samples(trainer, getattr(exception, "step", trainer.global_step), "not finite")

    def _note_samples(self, trainer: Trainer, step: int, event: str) -> None:
        """Write an event with the samples of a step, of all ranks."""
        if self.run is not None and step in self._positions_of_steps:
            plan = trainer.datamodule.plan  # type: ignore[attr-defined]  # Lightning types its trainer without one
            self.run.event(event, step=step, samples=plan.sample_indices(*self._positions_of_steps[step]))

    def _log_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast("HasStepMetrics", pl_module)
        seconds = time.perf_counter() - self._since
        loss = float(module.step_loss)
        values: dict[str, float | int] = {
            "loss": loss,
            "lr": self._lr,
            "grad_norm": float(module.grad_norm),
            "tokens": self.tokens,
            "loss_tokens": self.loss_tokens,
            "tokens_per_second": self._interval_tokens / seconds,
            "step_time": seconds / self._interval_steps,
            "epoch": trainer.current_epoch,
        }
        if self._peak_flops is not None:
            values["mfu"] = self._interval_flops / seconds / self._peak_flops
        if torch.cuda.is_available():
            values["memory_gb"], values["memory_rank"] = max_with_rank(torch.cuda.max_memory_allocated() / 1e9)
            torch.cuda.reset_peak_memory_stats()
        self.activity.loss = loss
        self._publish(trainer, values)
        self._restart_interval()

    def _restart_interval(self) -> None:
        self._interval_tokens = self._interval_steps = 0
        self._interval_flops = 0.0
        self._since = time.perf_counter()

    def _publish(self, trainer: Trainer, numbers: dict[str, float | int]) -> None:
        """Give metrics to the run folder, to the loggers, and to callbacks that watch a metric."""
        for name in ("loss", "grad_norm"):  # not by `log`: its bookkeeping costs ten times as much
            trainer.callback_metrics[name] = torch.tensor(float(numbers[name]))
        if self.run is None:
            return
        self.rank.log(trainer.global_step, numbers)
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)

    # ---- validation and saving ---------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the start of a validation."""
        self._before_validation = self.timer.enter("validation")
        self.activity.phase = "eval"
        self.activity.begin("validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the validation loss; the one before the training has step 0."""
        loss = trainer.callback_metrics.get("val_loss")
        if loss is not None:
            step = 0 if trainer.sanity_checking else trainer.global_step
            self.val_losses[step] = float(loss)
            if self.run is not None:
                self.rank.log(step, {"val_loss": float(loss)})
                for logger in trainer.loggers:
                    logger.log_metrics({"val_loss": float(loss)}, step=step)
        self.timer.enter(self._before_validation)
        self.activity.phase = "train"
        self._since += time.monotonic() - self.activity.doing_since  # validation does not count as training time

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record the start of a save."""
        self.timer.enter("saving")
        self.activity.phase = "save"
        self.activity.begin("save checkpoint")

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, which continue after a resume."""
        return {"tokens": self.tokens, "loss_tokens": self.loss_tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counters."""
        self.tokens, self.loss_tokens = state_dict["tokens"], state_dict["loss_tokens"]
