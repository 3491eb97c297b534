"""What a strategy of ours says to the rest: who shares out the data, how a model is cut, when gradients travel."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch.distributed
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel


@dataclass(frozen=True)
class DataParallel:
    """This process among those that share out the data; ranks of one tensor-parallel group run the same rows.

    Attributes:
        rank: Which share is this one's, from 0.
        size: How many shares there are.
        group: Processes that hold one share each; None for all of the run.
    """

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all shares, the same on every rank; ``tensor`` stays as it is."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone()
        torch.distributed.all_reduce(total, group=self.group)
        return total

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over all shares."""
        return self.sum(tensor) / self.size


@runtime_checkable
class DistributedCheckpointIO(Protocol):
    """A checkpoint format that every rank writes its own part of."""

    def save_together(self, checkpoint: dict[str, Any], path: str | Path) -> None:
        """Save what this rank holds; all ranks call this."""


class HubStrategy(ParallelStrategy):
    """A strategy of ours: it starts models from one reading, and knows the data-parallel ranks.

    A checkpoint is saved by all ranks, where its format can do that, and restored as soon as the model is there.
    """

    short_name: ClassVar[str]
    """What a checkpoint calls the strategy."""

    restore_checkpoint_after_setup = False

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: object = None) -> None:
        """Let every rank write its part to the path that rank 0 has chosen."""
        if isinstance(self.checkpoint_io, DistributedCheckpointIO):
            self.checkpoint_io.save_together(checkpoint, self.broadcast(filepath))
        else:
            super().save_checkpoint(checkpoint, filepath, storage_options)

    @property
    def data_parallel(self) -> DataParallel:
        """This process among those that share out the data."""
        return DataParallel(self.global_rank, self.world_size)

    @property
    def weights_device(self) -> torch.device:
        """Where weights lie between steps."""
        return self.root_device

    def parallelize(self, model: PreTrainedModel) -> None:
        """Cut a model, which has no memory yet; here every rank holds all of it."""

    def no_gradient_sync(self) -> AbstractContextManager[None]:
        """Return a context in which gradients stay on this rank, because more rows of the step follow.

        Nothing need be said by default: the hooks of DistributedDataParallel wait for the end of its own forward, in
        which all rows but the last have their backward.
        """
        return nullcontext()


def data_parallel(strategy: Strategy) -> DataParallel:
    """Return this process's place among the data-parallel ranks of any strategy."""
    if isinstance(strategy, HubStrategy):
        return strategy.data_parallel
    if isinstance(strategy, ParallelStrategy):
        return DataParallel(strategy.global_rank, strategy.world_size)
    return DataParallel()


def strategy_name(strategy: Strategy) -> str:
    """Return what a checkpoint calls a strategy."""
    if isinstance(strategy, HubStrategy):
        return strategy.short_name
    return type(strategy).__name__ if isinstance(strategy, ParallelStrategy) else "single"


def no_gradient_sync(strategy: Strategy) -> AbstractContextManager[None]:
    """Return the context for the backward of all rows of a step but the last."""
    return strategy.no_gradient_sync() if isinstance(strategy, HubStrategy) else nullcontext()
