"""Tensors that are sharded over a mesh: the local shard of a rank, and whole tensors from shards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor; it shares the tensor's memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_shard_of(whole: Tensor, target: Tensor) -> Tensor:
    """Return the part of a whole tensor that this rank holds of ``target``."""
    starts = shard_offsets(target)
    ends = [start + size for start, size in zip(starts, local_tensor(target).shape, strict=True)]
    return whole[tuple(slice(start, end) for start, end in zip(starts, ends, strict=True))]


def shard_offsets(tensor: Tensor) -> tuple[int, ...]:
    """Return where in the whole tensor the part of this rank begins, for each dimension.

    Inner axes are cut first: full sharding comes after the tensor-parallel split and cuts what that has left.
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
    """Return parameters in groups that lie on the same mesh: fused optimizers take no mixture."""
    groups: dict[object, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        groups[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    return list(groups.values())


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole weights of a model on rank 0 and nothing elsewhere; every rank must call this."""
    return full_tensors(model.state_dict(keep_vars=True))  # tied weights are one parameter under two names


def full_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole tensors on rank 0 and nothing elsewhere; every rank must call this.

    One tensor is whole at a time, so no rank but rank 0 ever holds more than its own part and one tensor. Tied
    weights are gathered once and share memory again. They lie on the host; where nothing is cut and the model lies
    there too, they are the model's own.
    """
    keeps = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    gathered: dict[int, Tensor] = {}
    for tensor in state.values():
        if id(tensor) not in gathered:
            whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()
            gathered[id(tensor)] = whole if keeps else whole.new_empty(0)
    return {name: gathered[id(tensor)] for name, tensor in state.items()} if keeps else {}
