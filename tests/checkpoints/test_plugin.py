from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_hub.checkpoints.plugin import OPTIMIZER, STATE, WEIGHTS, FolderCheckpointIO
from lightning_hub.checkpoints.rng import random_state, restore_random_state
from lightning_hub.checkpoints.storage import commit
from lightning_hub.checkpoints.tensors import load_tensors, save_tensors
from lightning_hub.runs.manifest import DamagedError, Manifest


def draw() -> list[float]:
    return [float(torch.rand(())), float(np.random.rand()), random.random()]


def test_random_states_come_back() -> None:
    state = random_state()
    first = draw()
    restore_random_state(state)
    assert draw() == first


def test_tied_tensors_are_written_once_and_come_back(tmp_path: Path) -> None:
    table = torch.randn(4, 3)
    tensors = {"embed": table, "head": table, "other": torch.randn(4, 3), "same shape": table.clone()}
    save_tensors(tensors, tmp_path / "w")
    found = load_tensors(tmp_path / "w")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert found["head"].data_ptr() == found["embed"].data_ptr()
    first = (tmp_path / "w").read_bytes()
    save_tensors(tensors, tmp_path / "w")
    assert (tmp_path / "w").read_bytes() == first


def checkpoint() -> dict[str, Any]:
    return {
        "global_step": 3,
        "state_dict": {"w": torch.randn(3)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.randn(3)}}, "param_groups": []}],
        "random_state": random_state(),
        "loops": {"epoch": 1},
    }


@pytest.mark.security("S2")
def test_everything_written_loads_without_running_code(tmp_path: Path) -> None:
    given = checkpoint()
    FolderCheckpointIO({"data": "x"}).save_checkpoint(given, tmp_path / "step-3")
    found = FolderCheckpointIO().load_checkpoint(tmp_path / "step-3")
    assert found["loops"] == {"epoch": 1}
    assert torch.equal(found["state_dict"]["w"], given["state_dict"]["w"])
    moments = [c["optimizer_states"][0]["state"][0]["exp_avg"] for c in (found, given)]
    assert torch.equal(*moments)


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.security("S1")
@pytest.mark.parametrize("file", [STATE, OPTIMIZER])
def test_a_hostile_checkpoint_runs_nothing(tmp_path: Path, file: str) -> None:
    canary = tmp_path / "canary"

    def write(folder: Path) -> None:
        save_tensors({"w": torch.zeros(1)}, folder / WEIGHTS)
        torch.save([], folder / OPTIMIZER)
        torch.save({}, folder / STATE)
        torch.save(Payload(canary), folder / file)

    commit(tmp_path / "step-1", Manifest(1, 1, "single"), write)
    with pytest.raises(pickle.UnpicklingError):
        FolderCheckpointIO().load_checkpoint(tmp_path / "step-1")
    assert not canary.exists()


def test_a_file_or_a_url_is_no_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path / "model.ckpt", "https://example.com/step-1"):
        with pytest.raises(DamagedError, match="no checkpoint folder"):
            FolderCheckpointIO().load_checkpoint(path)
