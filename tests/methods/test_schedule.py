from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import (
    get_constant_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from lightning_hub.errors import ConfigError
from lightning_hub.methods.schedule import Schedule

Reference = Callable[[torch.optim.Optimizer], LambdaLR]

CASES: list[tuple[Schedule, Reference]] = [
    (Schedule("constant", 5, 50, 0.0), lambda o: get_constant_schedule_with_warmup(o, 5)),
    (Schedule("linear", 5, 50, 0.0), lambda o: get_linear_schedule_with_warmup(o, 5, 50)),
    (Schedule("cosine", 5, 50, 0.1), lambda o: get_cosine_with_min_lr_schedule_with_warmup(o, 5, 50, min_lr_rate=0.1)),
    (
        Schedule("wsd", 5, 50, 0.0),
        lambda o: get_wsd_schedule(o, 5, num_decay_steps=5, num_stable_steps=40, decay_type="linear"),
    ),
]


@pytest.mark.parametrize(("schedule", "reference"), CASES, ids=[case[0].shape for case in CASES])
def test_factors_equal_those_of_transformers(schedule: Schedule, reference: Reference) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = reference(optimizer)
    for step in range(51):
        assert schedule(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        theirs.step()


def test_a_falling_schedule_needs_an_end() -> None:
    with pytest.raises(ConfigError, match="needs the number of steps"):
        Schedule("cosine", 0, math.inf, 0.0)
    assert Schedule("constant", 0, math.inf, 0.0)(10**9) == 1.0
