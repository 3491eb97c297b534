"""Sharded tensors in safetensors files: each rank writes its shards, and any rank can read every slice.

The header of a file has the offsets of its shards in the full tensors (``DCP_SHARDING_INFO``), in the format of torch's
safetensors storage, so that ``torch.distributed.checkpoint`` can read these files too. They cannot run code. One tensor
at a time is copied to the host, hashed and written: ``safetensors.save_file`` would need all of them on the host.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lightning_hub.checkpoints.storage import Files, write_file
from lightning_hub.runs.manifest import DamagedError

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""The names of dtypes in the format."""

OFFSETS = "DCP_SHARDING_INFO"
"""The metadata key of the offsets of shards in their full tensors."""

ALIASES = "aliases"
"""The metadata key of further names of tensors: tied weights are written once."""

OTHER_MODEL = "resume with its model, method and options"


@dataclass(frozen=True)
class Shard:
    """The block of a tensor that a rank has; it can be the full tensor.

    Attributes:
        data: The block; it shares memory with the live tensor.
        offsets: Where the block begins in the full tensor, for each dim.
        shape: The shape of the full tensor.
    """

    data: Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Shard:
        """Return the shard for a tensor that is complete on this rank."""
        return cls(tensor.detach(), (0,) * tensor.ndim, tuple(tensor.shape))


def write_tensors(path: Path, shards: Mapping[str, Shard], aliases: Mapping[str, str]) -> Files:
    """Write shards to a new safetensors file.

    Args:
        path: The file.
        shards: The shards, by the names of the full tensors.
        aliases: Further names of written tensors.

    Returns:
        The file's name with its size and hash.
    """
    ordered = sorted(
        shards.items(), key=lambda item: (-item[1].data.itemsize, item[0])
    )  # large dtypes first: all are aligned
    header: dict[str, object] = {
        "__metadata__": {
            "format": "pt",
            OFFSETS: json.dumps({name: {"saved_offsets": list(part.offsets)} for name, part in ordered}),
            ALIASES: json.dumps(aliases),
        }
    }
    end = 0
    for name, part in ordered:
        begin, end = end, end + part.data.nbytes
        header[name] = {
            "dtype": DTYPES[part.data.dtype],
            "shape": list(part.data.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return write_file(path, _blocks(text, ordered))


def _blocks(header: bytes, shards: Iterable[tuple[str, Shard]]) -> Iterator[bytes | memoryview]:
    yield struct.pack("<Q", len(header))
    yield header
    for _, shard in shards:
        yield shard.data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class _StoredShard:
    """One written shard: its file, its offsets in the full tensor, and its shape."""

    path: Path
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


class TensorReader:
    """The tensors of a checkpoint, from one or several files; data is read only when it is needed.

    Args:
        paths: All files of `write_tensors` of one checkpoint.

    Raises:
        DamagedError: A file cannot be read.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._pieces: dict[str, list[_StoredShard]] = {}
        self._aliases: dict[str, str] = {}
        self._files: dict[Path, Any] = {}
        self._stack = ExitStack()  # files stay mapped as long as this object exists
        for path in paths:
            try:
                self._open(path)
            except Exception as error:  # the library raises errors of several types for other bytes
                raise DamagedError(f"this is not a tensor file of a checkpoint ({error})", where=str(path)) from error

    def _open(self, path: Path) -> None:
        file = self._files[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        about = file.metadata() or {}
        offsets = json.loads(about.get(OFFSETS, "{}"))
        self._aliases |= json.loads(about.get(ALIASES, "{}"))
        for name in file.keys():  # noqa: SIM118  # not a dict
            shape = tuple(file.get_slice(name).get_shape())
            begin = tuple(offsets[name]["saved_offsets"]) if name in offsets else (0,) * len(shape)
            self._pieces.setdefault(name, []).append(_StoredShard(path, begin, shape))

    def names(self) -> list[str]:
        """Return the names of all tensors, aliases included."""
        return [*self._pieces, *self._aliases]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a full tensor."""
        ends = [[o + n for o, n in zip(piece.offsets, piece.shape, strict=True)] for piece in self._found(name)]
        return tuple(map(max, zip(*ends, strict=True)))

    def fill(self, name: str, shard: Shard) -> None:
        """Copy the block of ``shard`` from the stored tensor into its memory; only this block is read.

        Raises:
            DamagedError: The tensor is not stored, or not completely, or has another shape.
        """
        if self.shape(name) != shard.shape:
            message = f"{name} is stored with the shape {self.shape(name)}, the model has {shard.shape}"
            raise DamagedError(message, remedy=OTHER_MODEL)
        filled = 0
        for piece in self._found(name):
            begins = [max(a, b) for a, b in zip(piece.offsets, shard.offsets, strict=True)]
            ends = [
                min(a + n, b + m)
                for a, n, b, m in zip(piece.offsets, piece.shape, shard.offsets, shard.data.shape, strict=True)
            ]
            if any(end <= begin for begin, end in zip(begins, ends, strict=True)):
                continue
            target = shard.data[_block(begins, ends, shard.offsets)]
            target.copy_(self._read(piece, name, _block(begins, ends, piece.offsets)))
            filled += target.numel()
        if filled != shard.data.numel():
            message = f"only {filled} of {shard.data.numel()} elements of {name} are stored"
            raise DamagedError(message, remedy="resume from an older checkpoint")

    def _found(self, name: str) -> list[_StoredShard]:
        found = self._pieces.get(self._aliases.get(name, name))
        if found is None:
            raise DamagedError(f"{name} is not stored", remedy=OTHER_MODEL)
        return found

    def _read(self, piece: _StoredShard, name: str, block: tuple[slice, ...]) -> Tensor:
        file, stored = self._files[piece.path], self._aliases.get(name, name)
        found: Tensor = file.get_slice(stored)[block] if block else file.get_tensor(stored)
        return found


def _block(begins: list[int], ends: list[int], offsets: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(begin - o, end - o) for begin, end, o in zip(begins, ends, offsets, strict=True))
