"""Tensors in safetensors files: written part by part by those that hold the parts, read by anyone.

A file says where its parts begin in the whole tensors (``DCP_SHARDING_INFO``), in the form of torch's own safetensors
storage, so that ``torch.distributed.checkpoint`` reads these files too. Nothing in them can run code. One tensor at a
time is copied to the host, hashed and written.
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
"""What the format calls each dtype."""

OFFSETS = "DCP_SHARDING_INFO"
"""Where a file's header says at which place of the whole tensors its parts begin."""

ALIASES = "aliases"
"""Where a file's header names tensors that are another one: tied weights are written once."""

OTHER_MODEL = "resume with its model, method and options"


@dataclass(frozen=True)
class Shard:
    """What a process holds of a tensor: a block of it, all of it in the simplest case.

    Attributes:
        data: The block; it shares memory with the live tensor.
        offsets: Where the block begins in the whole, for each dimension.
        shape: The shape of the whole.
    """

    data: Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Shard:
        """Return a tensor that this process holds all of."""
        return cls(tensor.detach(), (0,) * tensor.ndim, tuple(tensor.shape))


def write_tensors(path: Path, parts: Mapping[str, Shard], aliases: Mapping[str, str]) -> Files:
    """Write parts to a new safetensors file.

    Args:
        path: The file.
        parts: What is written, by the names of the whole tensors.
        aliases: Further names of written tensors.

    Returns:
        The file's name with its size and hash.
    """
    ordered = sorted(parts.items(), key=lambda item: (-item[1].data.itemsize, item[0]))  # keeps every one aligned
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


def _blocks(header: bytes, parts: Iterable[tuple[str, Shard]]) -> Iterator[bytes | memoryview]:
    yield struct.pack("<Q", len(header))
    yield header
    for _, part in parts:
        yield part.data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class _StoredShard:
    """One written part: its file and its place in the whole tensor."""

    path: Path
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


class TensorReader:
    """The tensors of a checkpoint, wherever their parts lie; none is read before it is wanted.

    Args:
        paths: Files of `write_tensors`, all that belong together.

    Raises:
        DamagedError: A file is none of them.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._pieces: dict[str, list[_StoredShard]] = {}
        self._aliases: dict[str, str] = {}
        self._files: dict[Path, Any] = {}
        self._stack = ExitStack()  # files stay mapped until this object goes
        for path in paths:
            try:
                self._note(path)
            except Exception as error:  # whatever the library makes of bytes that are not its own
                raise DamagedError(f"this is no file of ours ({error})", where=str(path)) from error

    def _note(self, path: Path) -> None:
        file = self._files[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        about = file.metadata() or {}
        offsets = json.loads(about.get(OFFSETS, "{}"))
        self._aliases |= json.loads(about.get(ALIASES, "{}"))
        for name in file.keys():  # noqa: SIM118  # no dictionary
            shape = tuple(file.get_slice(name).get_shape())
            begin = tuple(offsets[name]["saved_offsets"]) if name in offsets else (0,) * len(shape)
            self._pieces.setdefault(name, []).append(_StoredShard(path, begin, shape))

    def names(self) -> list[str]:
        """Return the names of all tensors, aliases included."""
        return [*self._pieces, *self._aliases]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        ends = [[o + n for o, n in zip(piece.offsets, piece.shape, strict=True)] for piece in self._found(name)]
        return tuple(map(max, zip(*ends, strict=True)))

    def fill(self, name: str, part: Shard) -> None:
        """Copy a block of a stored tensor into the memory of a live one; only that block is read.

        Raises:
            DamagedError: The tensor is not stored, not wholly, or has another shape.
        """
        if self.shape(name) != part.shape:
            message = f"{name} is stored in the shape {self.shape(name)}, the model has {part.shape}"
            raise DamagedError(message, remedy=OTHER_MODEL)
        filled = 0
        for piece in self._found(name):
            begins = [max(a, b) for a, b in zip(piece.offsets, part.offsets, strict=True)]
            ends = [
                min(a + n, b + m)
                for a, n, b, m in zip(piece.offsets, piece.shape, part.offsets, part.data.shape, strict=True)
            ]
            if any(end <= begin for begin, end in zip(begins, ends, strict=True)):
                continue
            target = part.data[_block(begins, ends, part.offsets)]
            target.copy_(self._read(piece, name, _block(begins, ends, piece.offsets)))
            filled += target.numel()
        if filled != part.data.numel():
            raise DamagedError(f"{filled} of {part.data.numel()} numbers of {name} are stored")

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
