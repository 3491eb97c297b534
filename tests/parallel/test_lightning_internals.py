"""The private names of Lightning that are used still exist, with the signatures that are expected."""

from __future__ import annotations

import inspect

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from lightning_hub.parallel.lightning_internals import progress_of_finished_steps, trainer_of

PRIVATE = [
    (_SignalConnector.register_signal_handlers, ["self"]),
    (_TrainingEpochLoop._broadcast_sigterm_tensor, ["self"]),
    (_TrainingEpochLoop._should_check_val_fx, ["self", "data_fetcher"]),
    (inspect.getattr_static(_TrainingEpochLoop, "_is_training_done").fget, ["self"]),
    (ModelParallelStrategy._setup_distributed, ["self"]),
]


@pytest.mark.parametrize(("function", "parameters"), PRIVATE)
def test_functions_have_their_parameters(function: object, parameters: list[str]) -> None:
    assert callable(function)
    assert list(inspect.signature(function).parameters) == parameters


def test_attributes_exist() -> None:
    module, trainer = BoringModel(), Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert trainer_of(LightningModule()) is None
    module.trainer = trainer
    assert trainer_of(module) is trainer
    assert trainer._signal_connector is not None
    assert trainer.fit_loop._data_fetcher is None
    assert trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0
    assert "_device_mesh" in vars(ModelParallelStrategy())


def test_the_progress_has_the_keys_of_the_fit_loop() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    saved = trainer.fit_loop.state_dict()
    trainer.fit_loop.max_batches = 4
    made = progress_of_finished_steps(trainer, saved)
    assert set(made) <= set(saved)
    for key in ("epoch_progress", "epoch_loop.batch_progress"):
        assert set(made[key]) <= set(saved[key])
        assert set(made[key]["current"]) == set(saved[key]["current"])
