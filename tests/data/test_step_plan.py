from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hub.data.sample_store import SampleStore
from lightning_hub.data.step_plan import BatchSettings, StepLoader, StepPlan
from lightning_hub.errors import ConfigError, DataError
from lightning_hub.ops.batch import StepBatch

LENGTHS = [5, 9, 30, 2, 17, 8, 8, 12, 3, 25, 6]


def make(lengths: list[int] = LENGTHS) -> SampleStore:
    pairs = [([index + 1] * length, [-100, *[index + 1] * (length - 1)]) for index, length in enumerate(lengths)]
    return SampleStore.from_pairs(pairs)


def plan(samples_per_step: int | None = 4, tokens: int | None = None, shuffle: bool = True, seed: int = 1) -> StepPlan:
    return StepPlan(make(), BatchSettings(30, samples_per_step, tokens, shuffle=shuffle, seed=seed))


def ids(steps: list[StepBatch]) -> Counter[int]:
    """The trained samples of steps; a repeated row without labels does not count."""
    rows = [row for step in steps for row in step.rows if (row.labels != -100).any()]
    return Counter(sample for row in rows for sample in row.sample_ids)


@pytest.mark.parametrize("made", [plan(), plan(None, 60)], ids=["samples", "tokens"])
@pytest.mark.parametrize("epoch", [0, 3])
def test_each_sample_once_per_epoch(made: StepPlan, epoch: int) -> None:
    steps = [made.step(epoch, index) for index in range(len(made))]
    assert ids(steps) == Counter(range(len(LENGTHS)))
    assert sum(step.num_tokens for step in steps) == sum(LENGTHS)
    assert sum(step.num_trained for step in steps) == sum(LENGTHS) - len(LENGTHS)


@given(ranks=st.integers(1, 5), epoch=st.integers(0, 4), by_tokens=st.booleans(), shuffle=st.booleans())
def test_ranks_share_the_same_step(ranks: int, epoch: int, by_tokens: bool, shuffle: bool) -> None:
    made = plan(None, 90, shuffle) if by_tokens else plan(4, None, shuffle)
    for index in range(len(made)):
        alone = made.step(epoch, index)
        shared = [made.step(epoch, index, rank, ranks) for rank in range(ranks)]
        assert ids(shared) == ids([alone])
        assert len({len(step.rows) for step in shared}) == 1, "every rank runs as many forwards"
        assert {(step.num_trained, step.num_tokens) for step in shared} == {(alone.num_trained, alone.num_tokens)}
        assert all(row.num_tokens <= 30 for step in shared for row in step.rows)


def test_the_order_is_a_pure_function() -> None:
    first, second = plan(), plan()
    second.step(7, 0)
    assert [first.sample_indices(2, i) for i in range(len(first))] == [
        second.sample_indices(2, i) for i in range(len(second))
    ]
    assert [first.sample_indices(2, i) for i in range(len(first))] != [
        first.sample_indices(3, i) for i in range(len(first))
    ]
    assert plan(seed=2).sample_indices(2, 0) != first.sample_indices(2, 0)
    assert plan(shuffle=False).sample_indices(5, 0) == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_anywhere(workers: int) -> None:
    made = plan()
    straight = [made.step(1, index) for index in range(len(made))]
    loader = StepLoader(made, lambda: (1, 2), 0, 1, workers)
    resumed = list(islice(loader, None))
    assert [ids([step]) for step in resumed] == [ids([step]) for step in straight[2:]]
    assert len(loader) == len(straight)


def test_the_position_is_asked_when_the_first_step_is_wanted() -> None:
    asked: list[int] = []

    def position() -> tuple[int, int]:
        asked.append(1)
        return 0, 0

    steps = iter(StepLoader(plan(), position, 0, 1))
    assert asked == []
    next(steps)
    assert asked == [1]


def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigError, match="both set the size of a step"):
        BatchSettings(30, 4, 60, shuffle=True, seed=0)
    with pytest.raises(ConfigError, match=r"not a multiple.*use 60 or 90"):
        BatchSettings(30, None, 70, shuffle=True, seed=0)
    with pytest.raises(DataError, match="a sample has 30 tokens, a packed row holds 29"):
        StepPlan(make(), BatchSettings(29, 4, None, shuffle=True, seed=0))
