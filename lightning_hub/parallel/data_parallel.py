"""The base class of our strategies: data-parallel ranks, sharding of a model, and when gradients are all-reduced."""

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
    """The data-parallel rank of this process; ranks of one tensor-parallel group get the same data.

    Attributes:
        rank: The data-parallel rank, from 0.
        size: The data-parallel size.
        group: A process group with one process for each data-parallel rank; None for all ranks of the run.
    """

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all data-parallel ranks, equal on every rank; ``tensor`` does not change."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone()
        torch.distributed.all_reduce(total, group=self.group)
        return total

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over all data-parallel ranks."""
        return self.sum(tensor) / self.size


@runtime_checkable
class DistributedCheckpointIO(Protocol):
    """A checkpoint format in which every rank writes its own shards."""

    def save_together(self, checkpoint: dict[str, Any], path: str | Path) -> None:
        """Save the shards of this rank; all ranks must call this."""


class HubStrategy(ParallelStrategy):
    """Base class of our strategies: rank 0 loads a model for all ranks, and the data-parallel rank is known.

    All ranks save a checkpoint together if its format supports this. It is restored as soon as the model exists.
    """

    short_name: ClassVar[str]
    """The name of the strategy in a checkpoint."""

    restore_checkpoint_after_setup = False

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: object = None) -> None:
        """Make every rank write its shards to the path of rank 0."""
        if isinstance(self.checkpoint_io, DistributedCheckpointIO):
            self.checkpoint_io.save_together(checkpoint, self.broadcast(filepath))
        else:
            super().save_checkpoint(checkpoint, filepath, storage_options)

    @property
    def data_parallel(self) -> DataParallel:
        """The data-parallel rank of this process."""
        return DataParallel(self.global_rank, self.world_size)

    @property
    def weights_device(self) -> torch.device:
        """The device of the weights between steps."""
        return self.root_device

    def parallelize(self, model: PreTrainedModel) -> None:
        """Shard a model on the meta device; here every rank has the complete model."""

    def no_gradient_sync(self) -> AbstractContextManager[None]:
        """Return a context in which gradients are not all-reduced, because more micro-batches of the step follow.

        The default does nothing: DistributedDataParallel all-reduces only after the end of its own forward, and all
        micro-batches but the last have their backward before that.
        """
        return nullcontext()


def data_parallel(strategy: Strategy) -> DataParallel:
    """Return the data-parallel rank of this process for any strategy."""
    if isinstance(strategy, HubStrategy):
        return strategy.data_parallel
    if isinstance(strategy, ParallelStrategy):
        return DataParallel(strategy.global_rank, strategy.world_size)
    return DataParallel()


def strategy_name(strategy: Strategy) -> str:
    """Return the name of a strategy in a checkpoint."""
    if isinstance(strategy, HubStrategy):
        return strategy.short_name
    return type(strategy).__name__ if isinstance(strategy, ParallelStrategy) else "single"


def no_gradient_sync(strategy: Strategy) -> AbstractContextManager[None]:
    """Return the context for the backward of all micro-batches of a step but the last."""
    return strategy.no_gradient_sync() if isinstance(strategy, HubStrategy) else nullcontext()
