"""The store of tokenised samples: what preparation writes and what packing reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from lightning_hub.ops.rows import IGNORED

Ids = npt.NDArray[np.int32]
Indices = npt.NDArray[np.int64]

_Number = TypeVar("_Number", np.int32, np.int64)
_CHUNK = 16_384  # samples copied at a time, so that writing needs little memory


@dataclass(frozen=True, eq=False)
class SampleStore:
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
    def from_pairs(cls, pairs: Iterable[tuple[list[int], list[int]]], fingerprint: str) -> SampleStore:
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

    def save(self, folder: Path, *, order: Indices | None = None, fingerprint: str | None = None) -> None:
        """Write the store, or the samples of ``order`` from it, into a folder that is made.

        Every file is on the disk when this returns. Whoever needs all or nothing saves into a temporary folder and
        renames it, as the cache does.

        Args:
            folder: Where to write.
            order: Sample numbers in their new order, repeats allowed; None is all as they are.
            fingerprint: The hash that names the new content; None keeps the one of this store.
        """
        folder.mkdir(parents=True)
        order = np.arange(len(self), dtype=np.int64) if order is None else order
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.lengths[order])])
        _write(folder / "offsets", [offsets])
        _write(folder / "num_trained", [self.num_trained[order]])
        chunks = [order[start : start + _CHUNK] for start in range(0, len(order), _CHUNK)]
        _write(folder / "ids", (self.ids[self._tokens_of(chunk)] for chunk in chunks))
        _write(folder / "labels", (self.labels[self._tokens_of(chunk)] for chunk in chunks))
        about = {"samples": len(order), "tokens": int(offsets[-1]), "fingerprint": fingerprint or self.fingerprint}
        _write(folder / "samples.json", [np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)])

    def _tokens_of(self, chosen: Indices) -> Indices:
        """The positions of all tokens of these samples, one sample after the other."""
        lengths = self.lengths[chosen]
        begins = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)[:-1]])
        return np.repeat(self.offsets[chosen] - begins, lengths) + np.arange(lengths.sum(), dtype=np.int64)

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


def _write(path: Path, arrays: Iterable[npt.NDArray[np.generic]]) -> None:
    with path.open("wb") as stream:
        for array in arrays:
            array.tofile(stream)
        stream.flush()
        os.fsync(stream.fileno())


def _map(path: Path, kind: type[_Number], size: int) -> npt.NDArray[_Number]:
    if path.stat().st_size != size * np.dtype(kind).itemsize:
        raise ValueError(f"{path} should hold {size} numbers and does not")
    return np.memmap(path, kind, mode="r") if size else np.empty(0, kind)
