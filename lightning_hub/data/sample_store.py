"""The store of tokenised samples: preparation writes it, packing reads it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from lightning_hub.ops.batch import IGNORE_INDEX

Ids = npt.NDArray[np.int32]
Indices = npt.NDArray[np.int64]

_Number = TypeVar("_Number", np.int32, np.int64)
_CHUNK = 16_384  # samples copied at a time, so that writing needs little memory


def ragged_ranges(starts: Indices, counts: Indices) -> Indices:
    """Count up from each start: ``starts [5, 20]`` with ``counts [3, 2]`` is ``[5, 6, 7, 20, 21]``.

    Args:
        starts: The first index of each range, int64, shape ``(ranges,)``.
        counts: The length of each range, int64, the same shape.

    Returns:
        All ranges end to end, int64, shape ``(sum of counts,)``.
    """
    before = np.cumsum(counts) - counts  # the number of indices of all earlier ranges
    return np.repeat(starts - before, counts) + np.arange(counts.sum(), dtype=np.int64)


@dataclass(frozen=True, eq=False)
class SampleStore:
    """Token ids and labels of all samples, end to end in two flat arrays.

    Labels are aligned with the ids (``labels[t]`` is ``ids[t]`` where token ``t`` is trained, else
    ``IGNORE_INDEX``). The first token of a sample has no token before it and is never trained. The arrays may be
    memory-mapped: nothing is copied until a sample is read.

    Attributes:
        ids: All token ids, int32, shape ``(total tokens,)``.
        labels: All labels, int32, the same shape.
        offsets: The first token of each sample, and the end of the last, int64, shape ``(samples + 1,)``.
        num_trained: Trained tokens per sample, int32, shape ``(samples,)``.
        fingerprint: The sha256 of offsets, ids and labels in their order; equal samples have equal fingerprints,
            wherever the files are and whichever version of the code made them.
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
    def from_pairs(cls, pairs: Iterable[tuple[list[int], list[int]]]) -> SampleStore:
        """Build a store in memory from ``(ids, labels)`` lists.

        Args:
            pairs: One pair for each sample; both lists have the same length.
        """
        listed = list(pairs)
        lengths = np.array([len(ids) for ids, _ in listed], dtype=np.int64)
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        ids = np.concatenate([np.array(ids, dtype=np.int32) for ids, _ in listed])
        labels = [np.array(labels, dtype=np.int32) for _, labels in listed]
        return cls(
            ids=ids,
            labels=np.concatenate(labels),
            offsets=offsets,
            num_trained=np.array([int((label != IGNORE_INDEX).sum()) for label in labels], dtype=np.int32),
            fingerprint=hashlib.sha256(
                offsets.tobytes() + ids.tobytes() + np.concatenate(labels).tobytes()
            ).hexdigest(),
        )

    def save(self, folder: Path, order: Indices | None = None) -> None:
        """Write the samples of ``order`` into a folder that is made, with the fingerprint of what is written.

        Every file is on the disk when this returns. For all or nothing, save into a temporary folder and rename it, as
        the cache does.

        Args:
            folder: Where to write.
            order: Sample numbers in their new order, int64, shape ``(stored samples,)``; repeats are allowed. None
                keeps all samples as they are.
        """
        folder.mkdir(parents=True)
        order = np.arange(len(self), dtype=np.int64) if order is None else order
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.lengths[order])])
        chunks = [order[start : start + _CHUNK] for start in range(0, len(order), _CHUNK)]
        digest = hashlib.sha256()
        _write(folder / "offsets", [offsets], digest)
        _write(folder / "ids", (self.ids[self._tokens_of(chunk)] for chunk in chunks), digest)
        _write(folder / "labels", (self.labels[self._tokens_of(chunk)] for chunk in chunks), digest)
        _write(folder / "num_trained", [self.num_trained[order]])
        about = {"samples": len(order), "tokens": int(offsets[-1]), "fingerprint": digest.hexdigest()}
        _write(folder / "samples.json", [np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)])

    def _tokens_of(self, samples: Indices) -> Indices:
        """The positions of all tokens of these samples, sample by sample, int64, shape ``(tokens,)``."""
        return ragged_ranges(self.offsets[samples], self.lengths[samples])

    @classmethod
    def load(cls, folder: Path) -> SampleStore:
        """Map a saved store into memory, read-only.

        Raises:
            OSError: A file is missing or cannot be read.
            ValueError: The files do not fit together.
        """
        about = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
        samples, tokens = int(about["samples"]), int(about["tokens"])
        return cls(
            ids=_map(folder / "ids", np.int32, tokens),
            labels=_map(folder / "labels", np.int32, tokens),
            offsets=_map(folder / "offsets", np.int64, samples + 1),
            num_trained=_map(folder / "num_trained", np.int32, samples),
            fingerprint=str(about["fingerprint"]),
        )


def _write(path: Path, arrays: Iterable[npt.NDArray[np.generic]], digest: hashlib._Hash | None = None) -> None:
    with path.open("wb") as stream:
        for array in arrays:
            array.tofile(stream)
            if digest is not None:
                digest.update(np.ascontiguousarray(array).data)
        stream.flush()
        os.fsync(stream.fileno())


def _map(path: Path, kind: type[_Number], size: int) -> npt.NDArray[_Number]:
    if path.stat().st_size != size * np.dtype(kind).itemsize:
        raise ValueError(f"{path} should hold {size} numbers and does not")
    return np.memmap(path, kind, mode="r") if size else np.empty(0, kind)
