"""Keeps host memory that a step has freed for the next step."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_hub.ops.malloc import keep_freed_memory


class KeepMemory(Callback):
    """Keeps freed memory from the first step on; memory that the loading of the model frees before is returned."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the options of malloc if the model is on the CPU; a GPU has its own allocator."""
        if pl_module.device.type == "cpu":
            keep_freed_memory()
