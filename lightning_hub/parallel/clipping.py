"""Gradient norms and clipping over any mixture of whole, sharded and split weights.

Every gradient is counted exactly once, however many ranks hold it: squares of the local parts are summed, and only
over those axes of a gradient's own mesh along which it is cut.
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

Cut: TypeAlias = tuple[DeviceMesh, tuple[int, ...]] | None
"""A mesh and its axes along which tensors are cut; None if every rank holds all of them."""


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the 2-norm of all gradients as one vector, the same number on every rank (float32, no dimensions)."""
    groups: dict[Cut, list[Tensor]] = defaultdict(list)
    for gradient in _gradients(parameters):
        groups[_cut(gradient)].append(local_tensor(gradient))
    device = next((part.device for parts in groups.values() for part in parts), torch.device("cpu"))
    squares = [_sum_of_squares(cut, parts) for cut, parts in groups.items()]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), device=device)


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their common norm is at most ``max_norm``; return the norm before."""
    listed = list(parameters)
    norm = total_norm(listed)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in _gradients(listed):
        part = local_tensor(gradient)
        part.mul_(factor.to(part.device))
    return norm


def clip_grad_value(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Limit each entry of each gradient to ``-limit ... limit``."""
    for gradient in _gradients(parameters):
        local_tensor(gradient).clamp_(-limit, limit)


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad.detach() for parameter in parameters if parameter.grad is not None]


def _cut(tensor: Tensor) -> Cut:
    if not isinstance(tensor, DTensor):
        return None
    axes = []
    for axis, placement in enumerate(tensor.placements):
        assert not placement.is_partial(), "gradients have been reduced by the backward"
        if not placement.is_replicate():
            axes.append(axis)
    return (tensor.device_mesh, tuple(axes)) if axes else None


def _sum_of_squares(cut: Cut, parts: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm([part.float() if part.dtype != torch.float64 else part for part in parts])
    squares = torch.stack(norms).square().sum()
    if cut is not None:
        mesh, axes = cut
        squares = squares.to(mesh.device_type)  # offloaded gradients lie on the host, their mesh does not
        for axis in axes:
            torch.distributed.all_reduce(squares, group=mesh.get_group(axis))
    return squares
