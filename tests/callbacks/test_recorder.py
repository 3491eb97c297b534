"""What the recorder writes, step by step, without a training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_hub.callbacks.recorder import OutOfMemoryError, Recorder
from lightning_hub.errors import HubError
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.metrics import read_metrics
from lightning_hub.runs.rank_writer import RankWriter
from lightning_hub.runs.writer import StatusWriter


class Logger(list[tuple[dict[str, Any], int]]):
    def log_metrics(self, values: dict[str, Any], step: int) -> None:
        self.append((values, step))


def trainer(every: int) -> Any:
    return SimpleNamespace(
        global_step=0,
        current_epoch=0,
        log_every_n_steps=every,
        sanity_checking=False,
        callback_metrics={},
        loggers=[Logger()],
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_is_training_done=False)),
        datamodule=SimpleNamespace(
            plan=SimpleNamespace(sample_indices=lambda epoch, index: [10 * index, 10 * index + 1])
        ),
    )


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.attempt(1).mkdir(parents=True)
    return made


@pytest.fixture
def recorder(folder: RunFolder) -> Recorder:
    return Recorder(RankWriter(folder, 1), StatusWriter(folder))


def train(recorder: Recorder, counted: Any, steps: int, skipped: tuple[int, ...] = ()) -> None:
    optimizer: Any = SimpleNamespace(param_groups=[{"lr": 0.5}])
    row = SimpleNamespace(input_ids=torch.arange(9))
    batch: Any = SimpleNamespace(num_tokens=9, num_trained=4, rows=[row])
    for index in range(steps):
        module: Any = SimpleNamespace(step_loss=torch.tensor(0.0), grad_norm=torch.tensor(2.0), is_skipped=False)
        recorder.on_train_batch_start(counted, module, batch, index)
        recorder.on_before_optimizer_step(counted, module, optimizer)
        counted.global_step += 1
        module.step_loss, module.is_skipped = torch.tensor(1.0 / counted.global_step), counted.global_step in skipped
        counted.fit_loop.epoch_loop._is_training_done = index == steps - 1
        recorder.on_train_batch_end(counted, module, None, batch, index)


@pytest.mark.parametrize(
    ("every", "logged"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 3, 6, 7]), (50, [1, 7]), (0, [1, 7])]
)
def test_the_first_the_last_and_every_nth_step_are_logged(
    recorder: Recorder, folder: RunFolder, every: int, logged: list[int]
) -> None:
    counted = trainer(every)
    train(recorder, counted, 7)
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == logged == [step for _, step in counted.loggers[0]]
    assert [line["loss"] for line in lines] == pytest.approx([1 / step for step in logged])
    assert [line["tokens"] for line in lines] == [9 * step for step in logged], "also of steps that are not logged"
    assert [line["loss_tokens"] for line in lines] == [4 * step for step in logged]
    assert {(line["lr"], line["grad_norm"], line["epoch"]) for line in lines} == {(0.5, 2.0, 0)}
    assert float(counted.callback_metrics["loss"]) == pytest.approx(1 / 7)


def test_speed_is_of_the_steps_since_the_last_line(
    recorder: Recorder, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("lightning_hub.callbacks.recorder.time.perf_counter", lambda: now[0])
    recorder._restart_interval()
    counted = trainer(2)

    def three_seconds(*given: object) -> None:
        now[0] += 3.0

    monkeypatch.setattr(recorder, "on_before_optimizer_step", three_seconds)
    train(recorder, counted, 4)
    lines = read_metrics(folder)
    assert [line["step_time"] for line in lines] == [3.0, 3.0, 3.0]
    assert [line["tokens_per_second"] for line in lines] == [3.0, 3.0, 3.0]


def test_samples_of_a_skipped_step_are_noted(recorder: Recorder, folder: RunFolder) -> None:
    train(recorder, trainer(1), 4, skipped=(2, 4))
    events = [json.loads(line) for line in folder.events.read_text().splitlines()]
    assert [(event["event"], event["step"], event["samples"]) for event in events] == [
        ("skipped", 2, [10, 11]),
        ("skipped", 4, [30, 31]),
    ]


def test_samples_of_a_step_that_is_no_number_are_noted(recorder: Recorder, folder: RunFolder) -> None:
    class NoNumber(HubError):
        kind = "nan"
        step = 3

    counted = trainer(1)
    train(recorder, counted, 3)
    module: Any = None
    recorder.on_exception(counted, module, NoNumber("step 3 has loss nan"))
    (event,) = [json.loads(line) for line in folder.events.read_text().splitlines()]
    assert (event["event"], event["step"], event["samples"]) == ("not finite", 3, [20, 21])


@pytest.mark.parametrize(
    ("cause", "said"),
    [(MemoryError(), "MemoryError"), (RuntimeError("CUDA out of memory. Tried\n2"), "CUDA out of memory. Tried")],
)
def test_a_step_without_memory_is_described(recorder: Recorder, cause: Exception, said: str) -> None:
    counted = trainer(1)
    train(recorder, counted, 2)
    module: Any = None
    with pytest.raises(OutOfMemoryError, match=rf"in step 3, whose packed rows on this rank have 9 tokens \({said}\)"):
        recorder.on_exception(counted, module, cause)


def test_other_ranks_write_no_metrics(folder: RunFolder) -> None:
    counted = trainer(1)
    train(Recorder(RankWriter(folder, 1, rank=1, world_size=2), None), counted, 2)
    assert not folder.metrics.exists() or not read_metrics(folder)
    assert not counted.loggers[0]
    assert float(counted.callback_metrics["loss"]) == 0.5, "callbacks of every rank watch the loss"


def test_a_validation_before_training_stands_at_step_0(recorder: Recorder, folder: RunFolder) -> None:
    counted, module = trainer(1), SimpleNamespace()
    untyped: Any = module
    for step, sanity, loss in ((0, True, 3.0), (4, False, 2.0)):
        counted.global_step, counted.sanity_checking = step, sanity
        recorder.on_validation_start(counted, untyped)
        counted.callback_metrics["val_loss"] = torch.tensor(loss)
        recorder.on_validation_end(counted, untyped)
    assert [(line["step"], line["val_loss"]) for line in read_metrics(folder)] == [(0, 3.0), (4, 2.0)]
    assert recorder.val_losses == {0: 3.0, 4: 2.0}


def test_counters_go_on_after_a_resume(recorder: Recorder, folder: RunFolder) -> None:
    train(recorder, trainer(1), 3)
    again = Recorder(RankWriter(folder, 1), None)
    again.load_state_dict(recorder.state_dict())
    assert (again.tokens, again.loss_tokens) == (27, 12)
