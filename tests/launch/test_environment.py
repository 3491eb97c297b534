from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hub.errors import ConfigError
from lightning_hub.launch.devices import visible_gpus
from lightning_hub.launch.environment import RANK_VARIABLES, ProcessInfo, detect_process

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
VARIABLES = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_JOB_NAME": "train",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


@pytest.mark.parametrize(
    ("environ", "process"),
    [
        ({}, None),
        ({"RANK": "0"}, None),
        ({"LOCAL_RANK": "0"}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        (TORCHRUN, ProcessInfo(5, 8, 1, 4, "torchrun")),
        (VARIABLES, ProcessInfo(1, 2, 1, 2, "env")),
        ({**VARIABLES, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, ProcessInfo(3, 4, 1, 2, "env")),
        (SLURM, ProcessInfo(3, 4, 1, 2, "slurm")),
        ({**SLURM, "SLURM_JOB_NAME": "bash"}, None),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, None),
    ],
)
def test_the_place_is_what_the_launcher_says(environ: dict[str, str], process: ProcessInfo | None) -> None:
    assert detect_process(environ) == process


def test_ranks_of_our_own_know_their_run() -> None:
    own = {"LIGHTNING_HUB_RUN_DIR": "/runs/a", "LIGHTNING_HUB_ATTEMPT": "2", "LIGHTNING_HUB_LISTENER": "7"}
    assert detect_process({**TORCHRUN, **own}) == ProcessInfo(5, 8, 1, 4, "fit", Path("/runs/a"), 2, 7)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"WORLD_SIZE": "4"}, "MASTER_ADDR"),
        ({"RANK": "2"}, "WORLD_SIZE"),
        ({**VARIABLES, "RANK": "2"}, "rank 2 of 2"),
        ({**VARIABLES, "RANK": "one"}, "RANK is 'one'"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "local rank 4 of 4"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2,1"}, "tasks per node"),
    ],
)
def test_half_a_place_is_refused(environ: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        detect_process(environ)


@given(st.dictionaries(st.sampled_from((*RANK_VARIABLES, "MASTER_ADDR", "TORCHELASTIC_RUN_ID")), st.text(max_size=4)))
def test_any_environment_gives_a_place_or_a_sentence(environ: dict[str, str]) -> None:
    try:
        process = detect_process(environ)
    except ConfigError:
        return
    assert process is None or 0 <= process.rank < process.world_size


def test_gpus_are_counted_without_asking_them(tmp_path: Path) -> None:
    for name in ("0000:01:00.0", "0000:02:00.0", "0000:03:00.0"):
        (tmp_path / name).mkdir()
    assert visible_gpus({}, tmp_path) == 3
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2,0"}, tmp_path) == 2
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0,-1,1"}, tmp_path) == 1
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}, tmp_path / "no driver") == 0
