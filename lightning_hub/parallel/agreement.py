"""Processes that decide together by a vote; what one of them finds out for all goes through a crew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed


def largest(vote: int) -> int:
    """Return the largest number that any rank votes for; every rank must call this.

    The vote goes through the hosts and waits for no device: about 0.2 ms for two processes of one machine.
    """
    if not is_several():
        return vote
    votes = torch.tensor(vote)
    torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
    return int(votes)


def any_rank(flags: Sequence[bool]) -> list[bool]:
    """Return which flags are set on some rank; every rank must call this with as many."""
    if not is_several():
        return list(flags)
    votes = torch.tensor(flags, dtype=torch.int32)
    torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def worst(value: float) -> tuple[float, int]:
    """Return the largest value of all ranks and the rank that has it; every rank must call this."""
    if not is_several():
        return value, 0
    values = torch.zeros(torch.distributed.get_world_size(), dtype=torch.float64)
    values[torch.distributed.get_rank()] = value
    torch.distributed.all_reduce(values)
    return float(values.max()), int(values.argmax())


def is_several() -> bool:
    """Say whether this process is one of several that know each other."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
