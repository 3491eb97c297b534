"""When a checkpoint is due, which are kept, and what is the best: the rules alone, with a trainer that only counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_hub.callbacks.checkpoint_saver import CheckpointSaver, SaveRequest, StopRun
from lightning_hub.checkpoints.settings import Best, CheckpointSettings
from lightning_hub.runs.manifest import list_checkpoints

LENGTH = 4
"""Steps of an epoch."""


class Counting(SimpleNamespace):
    """A trainer that counts steps, and whose checkpoints are empty folders."""

    def save_checkpoint(self, target: Path) -> None:
        target.mkdir(parents=True)


def trainer(max_epochs: int, validates_every: int | None) -> Any:
    epoch_loop = SimpleNamespace()
    made = Counting(
        global_step=0,
        current_epoch=0,
        max_epochs=max_epochs,
        max_steps=-1,
        should_stop=False,
        sanity_checking=False,
        state=SimpleNamespace(fn="fit"),
        callback_metrics={},
        strategy=SimpleNamespace(checkpoint_io=None),
        fit_loop=SimpleNamespace(_data_fetcher=object(), epoch_loop=epoch_loop),
    )
    epoch_loop._should_check_val_fx = lambda fetcher: bool(validates_every and made.global_step % validates_every == 0)
    return made


def run(
    folder: Path,
    *,
    epochs: int = 2,
    validates_every: int | None = None,
    losses: Callable[[int], float] = float,
    stop_requests: dict[int, SaveRequest] | None = None,
    **settings: Any,
) -> tuple[list[int], list[int]]:
    """Count through a training; return the steps that were saved, and those that are kept."""
    counted, saved = trainer(epochs, validates_every), []
    callback = CheckpointSaver(
        CheckpointSettings(**settings),
        folder,
        {},
        request=lambda: (stop_requests or {}).get(counted.global_step),
        on_saved=lambda step, path: saved.append(step),
    )
    module: Any = None
    try:
        for counted.current_epoch in range(epochs):
            for index in range(LENGTH):
                counted.global_step += 1
                callback.on_train_batch_end(counted, module, None, None, index)
                if counted.fit_loop.epoch_loop._should_check_val_fx(None):
                    counted.callback_metrics["val_loss"] = torch.tensor(losses(counted.global_step))
                    callback.on_validation_end(counted, module)
            callback.on_train_epoch_end(counted, module)
        callback.on_train_end(counted, module)
    finally:
        kept = sorted(step for step, _ in list_checkpoints(folder))
        if kept:
            assert (folder / "latest").resolve() == folder / f"step-{saved[-1]}"
    return saved, kept


@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        ({}, [4, 8, 12]),
        ({"every_n_epochs": 2}, [8, 12]),
        ({"every_n_epochs": None}, [12]),
        ({"every_n_steps": 3}, [3, 4, 6, 8, 9, 12]),
        ({"every_n_steps": 5, "every_n_epochs": None}, [5, 10, 12]),
        ({"every_minutes": 1e-9, "every_n_epochs": None}, list(range(1, 13))),
        ({"every_minutes": 1e9, "every_n_epochs": None}, [12]),
    ],
    ids=str,
)
def test_what_is_due(tmp_path: Path, settings: dict[str, Any], saved: list[int]) -> None:
    assert run(tmp_path, epochs=3, keep=99, **settings) == (saved, saved)


def test_time_is_counted_from_the_last_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 30))  # half a minute for each look
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    assert run(tmp_path, every_minutes=1.0, every_n_epochs=None, keep=99)[0] == [2, 4, 6, 8]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    saved, kept = run(tmp_path, every_n_steps=1, keep=3)
    assert saved == [1, 2, 3, 4, 5, 6, 7, 8]
    assert kept == [6, 7, 8]


@pytest.mark.parametrize(
    ("best", "kept"),
    [
        (Best(), [2, 7, 8]),
        (Best(keep=2), [2, 6, 7, 8]),
        (Best(mode="max"), [4, 7, 8]),
        (Best(metric="accuracy"), [7, 8]),
    ],
    ids=str,
)
def test_the_best_are_kept_beside_the_newest(tmp_path: Path, best: Best, kept: list[int]) -> None:
    losses = {2: 0.1, 4: 0.9, 6: 0.2, 8: 0.5}.__getitem__
    assert run(tmp_path, every_n_steps=1, keep=2, validates_every=2, losses=losses, best=best)[1] == kept


def test_a_best_is_saved_where_nothing_else_is_due(tmp_path: Path) -> None:
    losses = {2: 0.5, 4: 0.9, 6: 0.2, 8: 0.7}.__getitem__
    saved, kept = run(tmp_path, every_n_epochs=None, validates_every=2, losses=losses, best=Best())
    assert saved == [2, 6, 8]
    assert kept == [6, 8]


def test_a_save_waits_for_the_validation_of_its_step(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    def losses(step: int) -> float:
        seen.append([saved for saved, _ in list_checkpoints(tmp_path)])
        return float(step)

    assert run(tmp_path, every_n_steps=2, every_n_epochs=None, validates_every=2, losses=losses, keep=99)[0] == [
        2,
        4,
        6,
        8,
    ]
    assert seen == [[], [2], [4, 2], [6, 4, 2]]


def test_a_sanity_check_saves_nothing(tmp_path: Path) -> None:
    callback = CheckpointSaver(CheckpointSettings(best=Best()), tmp_path, {}, lambda: None, lambda step, path: None)
    counted = trainer(1, None)
    counted.sanity_checking, counted.callback_metrics["val_loss"] = True, torch.tensor(1.0)
    callback.on_validation_end(counted, counted)
    assert not list(tmp_path.iterdir())


def test_wishes_are_heard_between_steps(tmp_path: Path) -> None:
    assert run(tmp_path / "saved", stop_requests={3: "checkpoint"}, keep=99)[0] == [3, 4, 8]
    with pytest.raises(StopRun, match="on request, after step 3"):
        run(tmp_path / "stopped", stop_requests={3: "stop"}, keep=99)
    assert [step for step, _ in list_checkpoints(tmp_path / "stopped")] == [3]


def test_checkpoints_of_a_given_up_attempt_do_not_count_as_newest(tmp_path: Path) -> None:
    for step in (90, 91):
        (tmp_path / f"step-{step}").mkdir()
    assert run(tmp_path, every_n_steps=1, keep=2)[1] == [7, 8]


def test_scores_survive_a_resume(tmp_path: Path) -> None:
    first, second = (
        CheckpointSaver(CheckpointSettings(best=Best()), tmp_path, {}, lambda: None, lambda step, path: None)
        for _ in range(2)
    )
    first._scores = {4: 0.25, 8: 0.125}
    second.load_state_dict(first.state_dict())
    assert second._scores == {4: 0.25, 8: 0.125}
    assert second._best_steps() == [8]
