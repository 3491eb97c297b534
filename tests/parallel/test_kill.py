"""Trainings that are killed during a save: a folder with a final name is complete, and the next attempt resumes."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from lightning_hub.runs.manifest import list_checkpoints, newest_valid, verify
from tests.conftest import WriteRows
from tests.parallel.multiprocess import TIME_LIMIT, started
from tests.parallel.resume_cases import TOPOLOGIES, ResumeCase, run_case

OTHER_DEVICE = Path("/dev/shm")


def save_for_ever(story: ResumeCase, temporary: Path) -> None:
    """Train and save after every step until the process is killed."""
    os.environ["TMPDIR"] = str(temporary)
    tempfile.tempdir = None
    run_case(story)


def newest_step(folder: Path) -> int:
    return next((step for step, _ in list_checkpoints(folder)), 0)


def kill_while_saving(story: ResumeCase, folder: Path, kills: int, temporary: Path) -> None:
    source = random.Random(0)
    for _ in range(kills):
        before, damaged = newest_valid(story.folder)
        assert not damaged
        began = newest_step(story.folder)
        attempt = partial(save_for_ever, replace(story, resume=before), temporary)
        ranks = started(TOPOLOGIES[story.topology].world_size, attempt, folder)
        try:
            end = time.monotonic() + TIME_LIMIT
            while newest_step(story.folder) <= began:
                assert all(process.is_alive() for process in ranks)
                assert time.monotonic() < end, "a resumed attempt saves after its first step"
                time.sleep(0.005)
            time.sleep(source.uniform(0.0, 0.2))  # the random moment is the point
        finally:
            source.shuffle(ranks)
            for process in ranks:
                process.kill()
            for process in ranks:
                process.join()
        for step, path in list_checkpoints(story.folder):
            assert verify(path).step == step
        assert newest_step(story.folder) > began


def real_saves(topology: str, data: Path, folder: Path) -> ResumeCase:
    return ResumeCase(
        topology,
        data,
        folder / "checkpoints",
        trainer={"max_epochs": 10_000, "limit_val_batches": 0},
        settings={"every_n_steps": 1},
    )


@pytest.mark.slow
@pytest.mark.fault("F17")
def test_kills_while_real_state_is_saved(tmp_path: Path, write_rows: WriteRows) -> None:
    kill_while_saving(real_saves("single", write_rows(50), tmp_path), tmp_path, 5, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("topology", ["single", "fsdp"])
@pytest.mark.parametrize("device", ["same", "other"])
def test_fifty_kills_while_real_state_is_saved(
    tmp_path: Path, write_rows: WriteRows, topology: str, device: str
) -> None:
    temporary = tmp_path
    if device == "other":
        if not OTHER_DEVICE.is_dir() or OTHER_DEVICE.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip(f"{OTHER_DEVICE} is not a separate device here")
        temporary = Path(tempfile.mkdtemp(dir=OTHER_DEVICE))
    kill_while_saving(real_saves(topology, write_rows(50), tmp_path), tmp_path, 50, temporary)
    if device == "other":
        shutil.rmtree(temporary)
