from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch.distributed

from lightning_hub.config.check import RecipeError
from lightning_hub.errors import ConfigError, HubError
from lightning_hub.launch.environment import ProcessInfo
from lightning_hub.methods.lora.liveness import DeadAdapterError
from lightning_hub.methods.nonfinite import NonFiniteStepError
from lightning_hub.parallel.collectives import Ranks, all_reduce_max, max_with_rank
from lightning_hub.parallel.process_group import destroy_process_group, init_process_group
from tests.parallel.multiprocess import processes


def agree() -> list[object]:
    rank = int(os.environ["RANK"])
    init_process_group(ProcessInfo(rank, 2, rank, 2, "env"), on_gpu=False)
    found: list[object] = [
        all_reduce_max(rank),
        max_with_rank(float(10 - rank)),
        Ranks().run_on_rank_zero(lambda: f"rank {rank}"),
    ]
    try:
        Ranks().run_on_rank_zero(fail)
    except HubError as error:
        found.append(str(error))
    destroy_process_group()
    return [*found, torch.distributed.is_initialized()]


def fail() -> None:
    raise HubError(f"only rank {os.environ['RANK']} knows")


@pytest.mark.slow
def test_ranks_agree_on_votes_results_and_errors(tmp_path: Path) -> None:
    assert processes(2, agree, tmp_path) == [[1, (10.0, 0), "rank 0", "only rank 0 knows", False]] * 2


def test_alone_everything_is_agreed_on() -> None:
    assert (all_reduce_max(3), max_with_rank(2.5), Ranks().run_on_rank_zero(lambda: 1)) == (3, (2.5, 0), 1)


@pytest.mark.parametrize(
    "error",
    [
        NonFiniteStepError(3, [float("nan"), 1.0]),
        DeadAdapterError("are frozen by now", ["layers.0.lora_A"], 42),
        RecipeError([ConfigError("one", where="a.yaml:1"), ConfigError("two", remedy="three")]),
        ConfigError("given", where="there", remedy="do it"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_the_same_when_it_has_travelled(error: HubError) -> None:
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert vars(found).keys() == vars(error).keys()
