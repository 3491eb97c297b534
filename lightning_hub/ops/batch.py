"""Packed rows and optimizer steps: the form in which the data gives tokens to the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a token that is context only (the value that transformers uses)."""


@dataclass(eq=False)  # not frozen: Lightning rebuilds batches field by field under half precision
class PackedSequence:
    """A packed row: several documents end to end, for one forward; attention stays within each document.

    Attributes:
        input_ids: Token ids, int64, shape ``(1, tokens)``.
        labels: Aligned with the ids, ``IGNORE_INDEX`` where a token is context; the first token of each document is
            ``IGNORE_INDEX``, so that no document predicts the start of the next. Int64, shape ``(1, tokens)``.
        position_ids: Positions that begin at 0 in each document, int64, shape ``(1, tokens)``.
        boundaries: Where the documents begin and end, ``(0, ..., tokens)``, on the host.
        sample_ids: The index of each document in the data.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    boundaries: tuple[int, ...]
    sample_ids: tuple[int, ...]

    @classmethod
    def pack(cls, documents: list[tuple[Tensor, Tensor]], sample_ids: tuple[int, ...] = ()) -> Self:
        """Join documents into a packed row.

        Args:
            documents: Pairs of ids and labels, each of shape ``(length,)``.
            sample_ids: The index of each document in the data; counts from 0 if left out.
        """
        boundaries = [0]
        for ids, _ in documents:
            boundaries.append(boundaries[-1] + len(ids))
        labels = torch.cat([labels for _, labels in documents]).long()
        labels[torch.tensor(boundaries[:-1])] = IGNORE_INDEX
        return cls(
            input_ids=torch.cat([ids for ids, _ in documents]).long().unsqueeze(0),
            labels=labels.unsqueeze(0),
            position_ids=torch.cat([torch.arange(len(ids)) for ids, _ in documents]).unsqueeze(0),
            boundaries=tuple(boundaries),
            sample_ids=sample_ids or tuple(range(len(documents))),
        )

    @property
    def num_tokens(self) -> int:
        """The number of all tokens of the packed row."""
        return self.boundaries[-1]

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each document."""
        return [end - start for start, end in pairwise(self.boundaries)]

    def documents(self) -> Iterator[PackedSequence]:
        """Yield each document as a packed row with one document."""
        for index, (start, end) in enumerate(pairwise(self.boundaries)):
            yield PackedSequence(
                self.input_ids[:, start:end],
                self.labels[:, start:end],
                self.position_ids[:, start:end],
                (0, end - start),
                self.sample_ids[index : index + 1],
            )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedSequence:
        """Return the packed row with its tensors on ``device``."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            position_ids=self.position_ids.to(device, non_blocking=non_blocking),
        )


@dataclass(eq=False)  # not frozen: Lightning rebuilds batches field by field under half precision
class StepBatch:
    """One optimizer step of this rank.

    Attributes:
        rows: The packed rows of this rank, at least one. Every rank has the same number, so that all ranks run the same
            number of forwards; a rank with less work repeats a packed row without labels.
        num_trained: Trained tokens of the complete step, over all packed rows and ranks: the divisor of the loss.
        num_tokens: Tokens of the complete step, over all packed rows and ranks, without repeated ones.
    """

    rows: tuple[PackedSequence, ...]
    num_trained: int
    num_tokens: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> StepBatch:
        """Return the step with its tensors on ``device`` (Lightning calls this before the step)."""
        return replace(self, rows=tuple(row.to(device, non_blocking) for row in self.rows))
