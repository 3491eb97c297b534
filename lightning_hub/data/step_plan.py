"""The order of the data: which samples form which optimizer step, for every epoch and any number of ranks.

The order is a pure function of the samples, the seed, the epoch and the batch settings. The world size never changes
which samples form a step, only which rank runs which of its packed rows. So the position in the data is one number, and
a run can resume from it on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_hub.config.rules import batch_size_fault, refuse
from lightning_hub.data.packing import assign_to_ranks, estimate_cost, pack, packing_efficiency
from lightning_hub.data.sample_store import SampleStore
from lightning_hub.errors import ConfigError, DataError
from lightning_hub.ops.batch import IGNORE_INDEX, PackedSequence, StepBatch


@dataclass(frozen=True)
class BatchSettings:
    """How samples form steps. `ChatData` describes the options; ``max_tokens`` is its ``max_tokens_per_gpu``."""

    max_tokens: int
    effective_batch_size: int | None
    tokens_per_step: int | None
    shuffle: bool
    seed: int

    def __post_init__(self) -> None:
        refuse(batch_size_fault(self.effective_batch_size, self.tokens_per_step))
        if self.effective_batch_size is None and self.tokens_per_step is None:
            raise ConfigError(
                "the size of a step is not set",
                where="data.init_args.effective_batch_size",
                remedy="set effective_batch_size or tokens_per_step",
            )
        if self.tokens_per_step is not None and self.tokens_per_step % self.max_tokens:
            below = self.tokens_per_step // self.max_tokens * self.max_tokens
            raise ConfigError(
                f"tokens_per_step {self.tokens_per_step} is not a multiple of max_tokens_per_gpu {self.max_tokens}",
                where="data.init_args.tokens_per_step",
                remedy=f"use {below or self.max_tokens} or {below + self.max_tokens}",
            )


class StepPlan:
    """The steps of every epoch.

    Args:
        samples: The tokenised samples.
        batching: How they form steps.
    """

    def __init__(self, samples: SampleStore, batching: BatchSettings) -> None:
        self.samples = samples
        self.batching = batching
        self._lengths = samples.lengths
        if batching.max_tokens < int(self._lengths.max(initial=0)):
            raise DataError(
                f"a sample has {int(self._lengths.max())} tokens, a packed row holds {batching.max_tokens}",
                where="data.init_args.max_tokens_per_gpu",
                remedy="raise it to max_seq_len or more",
            )
        self._epoch = -1
        self._sample_indices: list[list[int]] = []
        self._load(0)

    def __len__(self) -> int:
        return len(self._sample_indices)

    def _load(self, epoch: int) -> None:
        """Make the order of an epoch; it is kept until another epoch is needed."""
        if epoch == self._epoch:
            return
        count, batching = len(self.samples), self.batching
        generator = np.random.Generator(np.random.PCG64([batching.seed, epoch]))
        order = generator.permutation(count) if batching.shuffle else np.arange(count)
        if batching.effective_batch_size is not None:
            size = batching.effective_batch_size
            self._sample_indices = [order[start : start + size].tolist() for start in range(0, count, size)]
            self._rows: list[list[list[int]]] | None = None
        else:
            rows = [
                [int(order[position]) for position in row] for row in pack(self._lengths[order], batching.max_tokens)
            ]
            if batching.shuffle:
                rows = [rows[position] for position in generator.permutation(len(rows))]
            per_step = (batching.tokens_per_step or 0) // batching.max_tokens
            self._rows = [rows[start : start + per_step] for start in range(0, len(rows), per_step)]
            self._sample_indices = [[index for row in step for index in row] for step in self._rows]
        self._epoch = epoch

    def sample_indices(self, epoch: int, index: int) -> list[int]:
        """Return the indices of the samples of a step."""
        self._load(epoch)
        return self._sample_indices[index]

    def rows(self, epoch: int, index: int) -> list[list[int]]:
        """Return the packed rows of a step over all ranks, each a list of sample indices."""
        self._load(epoch)
        if self._rows is not None:
            return self._rows[index]
        samples = self._sample_indices[index]
        return [
            [samples[position] for position in row] for row in pack(self._lengths[samples], self.batching.max_tokens)
        ]

    def step(self, epoch: int, index: int, rank: int = 0, world_size: int = 1) -> StepBatch:
        """Return the packed rows of one rank in a step.

        Args:
            epoch: The epoch, from 0.
            index: The step within the epoch, from 0.
            rank: This data-parallel rank.
            world_size: Data-parallel ranks.
        """
        rows = self.rows(epoch, index)
        samples = [sample for row in rows for sample in row]
        shares = assign_to_ranks([estimate_cost(self._lengths[row]) for row in rows], world_size)
        mine = [self._row(rows[position]) for position in shares[rank]]
        missing = max(map(len, shares)) - len(mine)
        filler = [self._row(rows[0][:1], trained=False)] * missing
        return StepBatch(
            rows=(*mine, *filler),
            num_trained=int(self.samples.num_trained[samples].sum()),
            num_tokens=int(self._lengths[samples].sum()),
        )

    def _row(self, samples: list[int], trained: bool = True) -> PackedSequence:
        documents = []
        for sample in samples:
            ids, labels = self.samples[sample]
            shown = labels if trained else np.full_like(labels, IGNORE_INDEX)
            documents.append((torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(shown.astype(np.int64))))
        return PackedSequence.pack(documents, tuple(samples))

    def packing_efficiency(self) -> float:
        """Return the share of token slots of the first epoch that hold a token."""
        rows = [row for index in range(len(self)) for row in self.rows(0, index)]
        return packing_efficiency(rows, self._lengths, self.batching.max_tokens)


ResumePosition = Callable[[], tuple[int, int]]
"""Returns the epoch and the number of its finished steps."""


class StepLoader:
    """Yields the steps of one epoch after another, from the position of the run.

    Lightning sees a sized iterable whose items are whole optimizer steps; nothing in it depends on what was fetched
    ahead, so a resumed run continues with the very next step.

    Args:
        plan: The steps of every epoch.
        position: Returns the position of the run; called at the beginning of each epoch.
        rank: This data-parallel rank.
        world_size: Data-parallel ranks.
        num_workers: Processes that prepare steps ahead; 0 prepares them in the training process.
    """

    def __init__(
        self, plan: StepPlan, position: ResumePosition, rank: int, world_size: int, num_workers: int = 0
    ) -> None:
        self.plan = plan
        self.position = position
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[StepBatch]:
        """Yield the steps after the position.

        The position is read when the first step is needed, not before: Lightning makes its iterator as soon as it needs
        the number of steps, which is before it has restored a checkpoint.
        """
        epoch, done = self.position()
        steps = _EpochSteps(self.plan, epoch, self.rank, self.world_size)
        order = range(done, len(self.plan))
        private = torch.Generator()  # a loader draws a seed when it starts: the run's own random state does not change
        loader = DataLoader(steps, batch_size=None, sampler=order, num_workers=self.num_workers, generator=private)
        yield from loader

    def state_dict(self) -> dict[str, int]:
        """Return the position; with it, Lightning knows that the loader can resume within an epoch."""
        epoch, done = self.position()
        return {"epoch": epoch, "done": done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Do nothing: the position is that of Lightning, which has restored it already."""


class _EpochSteps(Dataset[StepBatch]):
    """The steps of one epoch as a dataset, so that worker processes can prepare them."""

    def __init__(self, plan: StepPlan, epoch: int, rank: int, world_size: int) -> None:
        self.plan, self.epoch, self.rank, self.world_size = plan, epoch, rank, world_size

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> StepBatch:
        return self.plan.step(self.epoch, index, self.rank, self.world_size)
