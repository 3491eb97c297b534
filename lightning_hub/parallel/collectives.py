"""Collectives on the host: numbers, objects, and functions whose errors every rank raises.

`Ranks` runs a function on every rank, or on rank 0 only; if one rank raises, every rank raises the same error. The
functions below it reduce numbers. All use the gloo backend on
the hosts and do not wait for a device.
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
    """The ranks that do something together: all ranks of the run, those of a group, or only this one.

    Args:
        alone: Whether this process works alone, although there may be other ranks.
        group: The process group; None for all ranks of the run.
    """

    def __init__(self, *, alone: bool = False, group: ProcessGroup | None = None) -> None:
        single = alone or not torch.distributed.is_initialized()
        self.group = group
        self.rank = 0 if single else torch.distributed.get_rank(group)
        self.size = 1 if single else torch.distributed.get_world_size(group)

    def all_gather_object(self, item: _T) -> list[_T]:
        """Return the items of all ranks, in the order of the ranks."""
        if self.size == 1:
            return [item]
        items: list[_T | None] = [None] * self.size
        torch.distributed.all_gather_object(items, item, group=self.group)
        return items  # type: ignore[return-value]  # all_gather_object has replaced every None

    def run_on_all(self, work: Callable[[], _T]) -> list[_T]:
        """Run a function on every rank, and return all results in the order of the ranks.

        Raises:
            Exception: The error of the first rank that failed; every rank raises it with the same message.
        """
        result: _T | None = None
        fault: Exception | None = None
        try:
            result = work()
        except Exception as error:  # sent to the other ranks, which would wait for ever, and raised on all
            fault = error
        outcomes = self.all_gather_object((result, None if fault is None else self._portable(fault)))
        first = next((error for _, error in outcomes if error is not None), None)
        if first is not None:
            raise first from fault
        return [outcome for outcome, _ in outcomes]  # type: ignore[misc]  # no rank failed

    def run_on_rank_zero(self, work: Callable[[], _T]) -> _T:
        """Run a function on rank 0, and return its result on every rank."""
        return self.run_on_all(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def _portable(self, error: Exception) -> Exception:
        """Return an error that can be pickled: a HubError as it is, any other as a HubError with its text."""
        if self.size == 1 or isinstance(error, HubError):
            return error
        return HubError(f"{type(error).__name__}: {error}", where=f"rank {self.rank}")


def all_reduce_max(number: int) -> int:
    """Return the largest number of any rank; every rank must call this.

    It does not wait for a device: about 0.2 ms for two processes on one node.
    """
    if not is_distributed():
        return number
    largest = torch.tensor(number)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest)


def all_reduce_any(flags: Sequence[bool]) -> list[bool]:
    """Return for each flag whether it is set on any rank; every rank must call this with the same number of flags."""
    if not is_distributed():
        return list(flags)
    largest = torch.tensor(flags, dtype=torch.int32)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in largest.tolist()]


def max_with_rank(value: float) -> tuple[float, int]:
    """Return the largest value of all ranks and the rank that has it; every rank must call this."""
    if not is_distributed():
        return value, 0
    values = torch.zeros(torch.distributed.get_world_size(), dtype=torch.float64)
    values[torch.distributed.get_rank()] = value
    torch.distributed.all_reduce(values)
    return float(values.max()), int(values.argmax())


def is_distributed() -> bool:
    """Return whether there is a process group with several ranks."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
