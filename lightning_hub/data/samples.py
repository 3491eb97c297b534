"""The store of tokenised samples: what preparation writes and what packing reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IGNORED = -100
"""The label of a token that is context only (the value that transformers uses)."""

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Samples:
    """Token ids and labels of all samples, end to end in two flat arrays.

    Labels are aligned with the ids (``labels[t]`` is ``ids[t]`` where token ``t`` is trained, else
    ``IGNORED``); the first token of a sample has nothing before it and is never trained. The arrays may be
    memory-mapped: nothing is copied until a sample is read.

    Attributes:
        ids: All token ids, int32, shape ``(total tokens,)``.
        labels: All labels, int32, the same shape.
        offsets: Where each sample starts, int64, shape ``(samples + 1,)``.
        num_trained: Trained tokens per sample, int32, shape ``(samples,)``.
        fingerprint: A hash of the content and of all that shaped it; equal prints mean equal samples.
    """

    ids: Ids
    labels: Ids
    offsets: npt.NDArray[np.int64]
    num_trained: Ids
    fingerprint: str

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each sample, shape ``(samples,)``."""
        return np.diff(self.offsets)

    def __getitem__(self, index: int) -> tuple[Ids, Ids]:
        """Return the ids and labels of one sample, each of shape ``(length,)``."""
        start, end = self.offsets[index], self.offsets[index + 1]
        return self.ids[start:end], self.labels[start:end]

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[list[int], list[int]]], fingerprint: str) -> Samples:
        """Build a store in memory from ``(ids, labels)`` lists.

        Args:
            pairs: One pair per sample, equally long.
            fingerprint: The hash that names the content.
        """
        listed = list(pairs)
        lengths = np.array([len(ids) for ids, _ in listed], dtype=np.int64)
        labels = [np.array(labels, dtype=np.int32) for _, labels in listed]
        return cls(
            ids=np.concatenate([np.array(ids, dtype=np.int32) for ids, _ in listed]),
            labels=np.concatenate(labels),
            offsets=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]),
            num_trained=np.array([int((row != IGNORED).sum()) for row in labels], dtype=np.int32),
            fingerprint=fingerprint,
        )
