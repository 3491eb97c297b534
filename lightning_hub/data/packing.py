"""Packing: decides which samples share a packed row.

Best fit decreasing: samples are placed longest first, each into the fullest packed row that still has free space for
it. Realistic lengths fill more than 0.999 of the token slots. Lengths are integers up to the capacity, so the work is
done for each distinct length and each distinct free space, not for each pair of sample and packed row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt

Lengths = Sequence[int] | npt.NDArray[np.int64]


def pack(lengths: Lengths, capacity: int) -> list[list[int]]:
    """Split samples into packed rows.

    Args:
        lengths: Tokens of each sample, each between 1 and ``capacity``.
        capacity: The most tokens of a packed row.

    Returns:
        The packed rows, each a list of indices into ``lengths``. Samples of equal length keep their order.

    Raises:
        ValueError: A sample is longer than a packed row.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    if len(sizes) and sizes[order[0]] > capacity:
        raise ValueError(f"a sample of {sizes[order[0]]} tokens does not fit a row of {capacity}")
    rows: list[list[int]] = []
    spaces: list[int] = []  # the distinct free capacities, ascending
    rows_with_space: dict[int, list[int]] = {}
    for length, group in groupby(zip(sizes[order].tolist(), order.tolist(), strict=True), key=lambda pair: pair[0]):
        waiting = [index for _, index in group]
        done = 0
        while done < len(waiting):
            position = bisect_left(spaces, length)
            if position < len(spaces):
                space = spaces[position]
                row = rows_with_space[space].pop()
                if not rows_with_space[space]:
                    del rows_with_space[space]
                    del spaces[position]
            else:
                space, row = capacity, len(rows)
                rows.append([])
            count = min(space // length, len(waiting) - done)
            rows[row].extend(waiting[done : done + count])
            done += count
            left = space - count * length
            if left:
                if left not in rows_with_space:
                    rows_with_space[left] = []
                    insort(spaces, left)
                rows_with_space[left].append(row)
    return rows


def packing_efficiency(rows: list[list[int]], lengths: Lengths, capacity: int) -> float:
    """Return the share of the token slots of all packed rows that hold a token."""
    return float(np.asarray(lengths).sum()) / (len(rows) * capacity) if rows else 0.0


def assign_to_ranks(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Assign packed rows to ranks: equal numbers where possible, then equal cost.

    Args:
        costs: The estimated cost of each packed row.
        ranks: Data-parallel ranks.

    Returns:
        For each rank the indices of its packed rows; the numbers differ by at most one.
    """
    most = -(-len(costs) // ranks)
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for row in sorted(range(len(costs)), key=lambda index: -costs[index]):
        open_ranks = [rank for rank in range(ranks) if len(shares[rank]) < most]
        lightest = min(open_ranks, key=lambda rank: (load[rank], rank))
        shares[lightest].append(row)
        load[lightest] += costs[row]
    return shares


def estimate_cost(lengths: Lengths, width: int = 4096) -> float:
    """Return the estimated cost of a packed row: linear layers grow with its tokens, attention with their squares.

    Args:
        lengths: Tokens of each document of the packed row.
        width: Hidden size of the model; the ratio of the two terms is ``length / (6 * width)``.
    """
    sizes = np.asarray(lengths, dtype=np.float64)
    return float((sizes + sizes**2 / (6 * width)).sum())
