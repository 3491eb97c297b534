"""Checkpoints that are written while training continues."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any
from unittest import mock

import pytest
from lightning.pytorch import Callback, Trainer

from lightning_hub.checkpoints import checkpoint_io
from lightning_hub.checkpoints.storage import Files
from lightning_hub.checkpoints.tensors import write_tensors
from lightning_hub.errors import HubError
from lightning_hub.runs.manifest import list_checkpoints, verify
from tests.conftest import WriteRows
from tests.parallel.multiprocess import processes
from tests.parallel.resume_cases import ResumeCase, run_case
from tests.parallel.test_checkpoints import full_disk_on_rank_1


class SlowDisk(Callback):
    """A disk that takes the save of step 2 only after step 4."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.free = Event()
        self.seen: dict[int, list[str]] = {}

    def write(self, *args: Any) -> Files:
        assert self.free.wait(60), "training continues while the disk is slow"
        return write_tensors(*args)

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        self.seen[trainer.global_step] = sorted(path.name for path in self.folder.glob("*"))
        if trainer.global_step == 4:
            self.free.set()


@pytest.mark.slow
def test_a_slow_disk_delays_no_step_and_nothing_is_known_before_it_is_whole(
    tmp_path: Path, write_rows: WriteRows
) -> None:
    settings = {"every_n_steps": 2, "every_n_epochs": None, "keep": 99}
    story = ResumeCase("single", write_rows(100), tmp_path / "now", trainer={"max_steps": 7}, settings=settings)
    run_case(story)
    disk = SlowDisk(tmp_path / "later")
    with mock.patch.object(checkpoint_io, "write_tensors", disk.write):
        run_case(replace(story, folder=tmp_path / "later", settings={**settings, "asynchronous": True}), disk)
    assert [disk.seen[step] for step in (3, 4)] == [["step-2.tmp"]] * 2
    steps = [step for step, _ in list_checkpoints(tmp_path / "now")]
    assert [step for step, _ in list_checkpoints(tmp_path / "later")] == steps == [7, 6, 4, 2]
    for step in steps:
        now, later = (verify(tmp_path / name / f"step-{step}").files for name in ("now", "later"))
        assert now == later
    assert (tmp_path / "later/latest").resolve().name == "step-7"


def told_fault(story: ResumeCase) -> tuple[str, str]:
    try:
        with mock.patch.object(checkpoint_io, "write_tensors", full_disk_on_rank_1):
            run_case(story)
    except HubError as error:
        return error.kind, str(error)
    return "", "no error"


@pytest.mark.slow
def test_a_fault_in_the_background_ends_every_rank(tmp_path: Path, write_rows: WriteRows) -> None:
    settings = {"every_n_steps": 2, "asynchronous": True}
    story = ResumeCase("fsdp", write_rows(50), tmp_path / "run", settings=settings)
    first, second = processes(2, partial(told_fault, story), tmp_path)
    assert first == second
    assert first[0] == "disk"
    assert not list(story.folder.iterdir())
