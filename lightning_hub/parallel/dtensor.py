"""Tensors that are sharded over a mesh: the local shard of a rank, and full tensors from shards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the local shard of a tensor; it shares the memory of the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_shard_of(full: Tensor, target: Tensor) -> Tensor:
    """Return the slice of a full tensor that is the local shard of ``target``."""
    starts = shard_offsets(target)
    ends = [start + size for start, size in zip(starts, local_tensor(target).shape, strict=True)]
    return full[tuple(slice(start, end) for start, end in zip(starts, ends, strict=True))]


def shard_offsets(tensor: Tensor) -> tuple[int, ...]:
    """Return the offset of the local shard in the full tensor, for each dim.

    Inner mesh axes are sharded first: FSDP comes after the tensor-parallel split, and shards the result of it.
    """
    starts, sizes = [0] * tensor.ndim, list(tensor.shape)
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        for axis in reversed(range(mesh.ndim)):
            placement = tensor.placements[axis]
            if not placement.is_replicate():
                dim: int = placement.dim  # type: ignore[attr-defined]  # the two kinds of shard share no base class
                length = -(-sizes[dim] // mesh.size(axis))
                before = min(mesh.get_local_rank(axis) * length, sizes[dim])
                starts[dim] += before
                sizes[dim] = min(length, sizes[dim] - before)
    return tuple(starts)


def group_by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return parameters grouped by their mesh: fused optimizers do not support several meshes in one group."""
    groups: dict[object, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        groups[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    return list(groups.values())


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the full weights of a model on rank 0, and an empty dict on other ranks; every rank must call this."""
    return full_tensors(model.state_dict(keep_vars=True))  # tied weights are one parameter under two names


def full_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return full tensors on rank 0, and an empty dict on other ranks; every rank must call this.

    Tensors are gathered one by one, so ranks other than 0 need memory for their shards and one full tensor only. Tied
    weights are gathered once and share memory again. The result is on the host; tensors that are not sharded and
    already on the host are not copied.
    """
    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    gathered: dict[int, Tensor] = {}
    for tensor in state.values():
        if id(tensor) not in gathered:
            full = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()
            gathered[id(tensor)] = full if is_first else full.new_empty(0)
    return {name: gathered[id(tensor)] for name, tensor in state.items()} if is_first else {}
