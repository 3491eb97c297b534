"""Weights in safetensors files, shared tensors written once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors; names that share memory (tied weights) are written once and remembered as aliases."""
    first: dict[tuple[int, torch.Size], str] = {}
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
            kept[name] = tensor.detach().contiguous().cpu()
    save_file(
        kept,
        path,
        metadata={"aliases": json.dumps(aliases)},  # one entry: several are written in any order
    )


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote, aliases included."""
    with safe_open(path, framework="pt") as stream:
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118  # no dictionary
        aliases = json.loads((stream.metadata() or {}).get("aliases", "{}"))
    return tensors | {alias: tensors[name] for alias, name in aliases.items()}


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return what tensors take on disk, shared memory counted once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors.values()}.values())
