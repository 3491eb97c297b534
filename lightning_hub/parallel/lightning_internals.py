"""The private names of Lightning that this package uses, all in this module.

None of them has a public counterpart. A test checks that each still exists with its signature, so an upgrade that
changes one fails there. The module is in ``parallel/`` because this is the lowest package that uses Lightning.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh


def trainer_of(module: LightningModule) -> Trainer | None:
    """Return the trainer of a module, or None; the public property raises an error where there is none."""
    trainer: Trainer | None = module._trainer
    return trainer


def disable_signal_handlers(trainer: Trainer) -> None:
    """Leave signals to this package.

    Lightning's handler broadcasts from inside the handler, where ranks can wait for each other for ever. Its loop also
    sends a flag through the devices before every step, and waits for it.
    """
    internals: Any = trainer
    internals._signal_connector.register_signal_handlers = lambda: None
    internals.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def is_validation_next(trainer: Trainer) -> bool:
    """Return whether the fit loop validates after the step that has just ended."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is None or bool(trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher))


def is_last_step(trainer: Trainer) -> bool:
    """Return whether the epoch or the whole training ends with the step that has just ended."""
    return bool(trainer.fit_loop.epoch_loop._is_training_done)


def progress_of_finished_steps(trainer: Trainer, saved: dict[str, Any]) -> dict[str, Any]:
    """Return the progress of the fit loop as if exactly the finished steps were counted, and no step had started.

    Lightning's counters differ with the hook from which a checkpoint is saved, and its restart code has one stage for
    each. The form that is returned is the one that Lightning calls "restarted on last".

    Args:
        trainer: The trainer.
        saved: The state of the fit loop as Lightning saves it.
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


def set_up_mesh(strategy: ModelParallelStrategy, sizes: dict[str, int]) -> None:
    """Initialise the process group of a strategy, and give it a mesh with axes of these names and sizes."""
    strategy._setup_distributed()
    strategy._device_mesh = init_device_mesh(
        strategy.root_device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)
    )
