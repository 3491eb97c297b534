"""Host memory that a step has freed is kept for the next one."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_hub.ops.malloc import keep_freed_memory


class KeepMemory(Callback):
    """Keeps freed memory from the first step on: a model that is read before it may give back what it needs no more."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set it where the host does the work; tensors of a GPU have an allocator of their own."""
        if pl_module.device.type == "cpu":
            keep_freed_memory()
