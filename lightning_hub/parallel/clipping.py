"""Gradient norms and clipping for any mixture of replicated and sharded weights.

Every gradient is counted exactly once, for any number of replicas: the squares of the local shards are summed, and
all-reduced only over those axes of the mesh of a gradient along which it is sharded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lightning_hub.parallel.dtensor import local_tensor

ShardAxes: TypeAlias = tuple[DeviceMesh, tuple[int, ...]] | None
"""A mesh and those of its axes along which tensors are sharded; None for tensors that are complete on every rank."""


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the 2-norm of all gradients as one vector, a float32 scalar that is equal on every rank."""
    groups: dict[ShardAxes, list[Tensor]] = defaultdict(list)
    for gradient in _gradients(parameters):
        groups[_shard_axes(gradient)].append(local_tensor(gradient))
    device = next((shard.device for shards in groups.values() for shard in shards), torch.device("cpu"))
    squares = [_sum_of_squares(axes, shards) for axes, shards in groups.items()]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), device=device)


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their total norm is at most ``max_norm``; return the norm before (float32 scalar)."""
    listed = list(parameters)
    norm = total_norm(listed)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in _gradients(listed):
        shard = local_tensor(gradient)
        shard.mul_(factor.to(shard.device))
    return norm


def clip_grad_value(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Clamp each element of each gradient to ``-limit ... limit``."""
    for gradient in _gradients(parameters):
        local_tensor(gradient).clamp_(-limit, limit)


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad.detach() for parameter in parameters if parameter.grad is not None]


def _shard_axes(tensor: Tensor) -> ShardAxes:
    if not isinstance(tensor, DTensor):
        return None
    axes = []
    for axis, placement in enumerate(tensor.placements):
        assert not placement.is_partial(), "gradients have been reduced by the backward"
        if not placement.is_replicate():
            axes.append(axis)
    return (tensor.device_mesh, tuple(axes)) if axes else None


def _sum_of_squares(shard_axes: ShardAxes, shards: list[Tensor]) -> Tensor:
    """Return the sum of the squares of full gradients, a scalar: float32, or float64 if the gradients are.

    Args:
        shard_axes: The mesh, and the axes along which all these gradients are sharded.
        shards: The local shard of each gradient, any shape.
    """
    norms = torch._foreach_norm([shard.float() if shard.dtype != torch.float64 else shard for shard in shards])
    squares = torch.stack(norms).square().sum()
    if shard_axes is not None:
        mesh, axes = shard_axes
        squares = squares.to(mesh.device_type)  # offloaded gradients are on the host, and the mesh is not
        for axis in axes:
            torch.distributed.all_reduce(squares, group=mesh.get_group(axis))
    return squares
