"""Collectives on the host: votes, objects, and work whose errors every rank raises.

`Ranks` runs a function on every rank, or on rank 0 only; if one rank raises, every rank raises the same error. The
functions below it reduce numbers. All go through the hosts and wait for no device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed
from torch.distributed import ProcessGroup

from lightning_hub.errors import HubError

_T = TypeVar("_T")


class Ranks:
    """This process and those that do something with it: all of the run, or those of a group.

    Args:
        alone: Whether this process works by itself, although others may exist.
        group: Through which the processes talk; that of the whole run if None.
    """

    def __init__(self, *, alone: bool = False, group: ProcessGroup | None = None) -> None:
        single = alone or not torch.distributed.is_initialized()
        self.group = group
        self.rank = 0 if single else torch.distributed.get_rank(group)
        self.size = 1 if single else torch.distributed.get_world_size(group)

    def all_gather_object(self, item: _T) -> list[_T]:
        """Return what every process gave, in the order of their ranks."""
        if self.size == 1:
            return [item]
        items: list[_T | None] = [None] * self.size
        torch.distributed.all_gather_object(items, item, group=self.group)
        return items  # type: ignore[return-value]  # every place is filled

    def run_on_all(self, work: Callable[[], _T]) -> list[_T]:
        """Do something in every process and return what each has got.

        Raises:
            Exception: What the first rank that failed has raised, the same sentence in every process.
        """
        result: _T | None = None
        fault: Exception | None = None
        try:
            result = work()
        except Exception as error:  # it travels to the other ranks, which would wait for ever, and is raised on all
            fault = error
        outcomes = self.all_gather_object((result, None if fault is None else self._portable(fault)))
        first = next((error for _, error in outcomes if error is not None), None)
        if first is not None:
            raise first from fault
        return [outcome for outcome, _ in outcomes]  # type: ignore[misc]  # nobody failed

    def run_on_rank_zero(self, work: Callable[[], _T]) -> _T:
        """Do something on rank 0 and return what it has got, to all."""
        return self.run_on_all(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def _portable(self, error: Exception) -> Exception:
        """Return an error that can travel: one of ours as it is, another by its words."""
        if self.size == 1 or isinstance(error, HubError):
            return error
        return HubError(f"{type(error).__name__}: {error}", where=f"rank {self.rank}")


def all_reduce_max(vote: int) -> int:
    """Return the largest number that any rank votes for; every rank must call this.

    The vote goes through the hosts and waits for no device: about 0.2 ms for two processes of one machine.
    """
    if not is_distributed():
        return vote
    votes = torch.tensor(vote)
    torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
    return int(votes)


def all_reduce_any(flags: Sequence[bool]) -> list[bool]:
    """Return which flags are set on some rank; every rank must call this with as many."""
    if not is_distributed():
        return list(flags)
    votes = torch.tensor(flags, dtype=torch.int32)
    torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def max_with_rank(value: float) -> tuple[float, int]:
    """Return the largest value of all ranks and the rank that has it; every rank must call this."""
    if not is_distributed():
        return value, 0
    values = torch.zeros(torch.distributed.get_world_size(), dtype=torch.float64)
    values[torch.distributed.get_rank()] = value
    torch.distributed.all_reduce(values)
    return float(values.max()), int(values.argmax())


def is_distributed() -> bool:
    """Say whether this process is one of several that know each other."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
