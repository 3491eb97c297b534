from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch.distributed

from lightning_hub.config.check import RecipeError
from lightning_hub.errors import ConfigError, HubError
from lightning_hub.launch.environment import Place
from lightning_hub.methods.lora.liveness import DeadAdapterError
from lightning_hub.methods.nonfinite import UnfitStepError
from lightning_hub.parallel.collectives import Crew, largest, worst
from lightning_hub.parallel.process_group import join, leave
from tests.parallel.multiprocess import processes


def agree() -> list[object]:
    rank = int(os.environ["RANK"])
    join(Place(rank, 2, rank, 2, "env"), on_gpu=False)
    found: list[object] = [largest(rank), worst(float(10 - rank)), Crew().on_first(lambda: f"rank {rank}")]
    try:
        Crew().on_first(fail)
    except HubError as error:
        found.append(str(error))
    leave()
    return [*found, torch.distributed.is_initialized()]


def fail() -> None:
    raise HubError(f"only rank {os.environ['RANK']} knows")


@pytest.mark.slow
def test_ranks_agree_on_votes_results_and_errors(tmp_path: Path) -> None:
    assert processes(2, agree, tmp_path) == [[1, (10.0, 0), "rank 0", "only rank 0 knows", False]] * 2


def test_alone_everything_is_agreed_on() -> None:
    assert (largest(3), worst(2.5), Crew().on_first(lambda: 1)) == (3, (2.5, 0), 1)


@pytest.mark.parametrize(
    "error",
    [
        UnfitStepError(3, [float("nan"), 1.0]),
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
