from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hub.data.packing import assign_to_ranks, pack, packing_efficiency

Lengths = st.lists(st.integers(1, 50), max_size=60)


def naive_best_fit(lengths: list[int], capacity: int) -> int:
    """The number of rows of best fit decreasing, by looking at every row for every sample."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [place for place, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda place: rooms[place])] -= length
        else:
            rooms.append(capacity - length)
    return len(rooms)


@given(lengths=Lengths, capacity=st.integers(50, 120))
def test_every_sample_is_in_one_row_and_no_row_is_too_full(lengths: list[int], capacity: int) -> None:
    rows = pack(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= capacity for row in rows)


@given(lengths=Lengths, capacity=st.integers(50, 120))
def test_as_few_rows_as_the_plain_algorithm(lengths: list[int], capacity: int) -> None:
    assert len(pack(lengths, capacity)) == naive_best_fit(lengths, capacity)


def test_realistic_lengths_fill_the_rows() -> None:
    source = np.random.default_rng(0)
    lengths = np.clip(source.lognormal(5, 0.9, 20_000), 8, 2048).astype(np.int64)
    for capacity in (2048, 8192):
        assert packing_efficiency(pack(lengths, capacity), lengths, capacity) >= 0.999


def test_a_sample_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="51 tokens does not fit a row of 50"):
        pack([3, 51], 50)


@given(costs=st.lists(st.floats(0.1, 100), max_size=40), ranks=st.integers(1, 5))
def test_ranks_share_all_rows_evenly(costs: list[float], ranks: int) -> None:
    shares = assign_to_ranks(costs, ranks)
    assert sorted(row for share in shares for row in share) == list(range(len(costs)))
    assert max(map(len, shares)) - min(map(len, shares)) <= max(1, len(costs) % ranks and ranks)
