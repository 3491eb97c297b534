"""Parts of tensors: what a rank holds of one that is cut over a mesh."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def own_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor; it shares the tensor's memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(whole: Tensor, target: Tensor) -> Tensor:
    """Return the part of a whole tensor that this rank holds of ``target``.

    Inner axes are cut first: full sharding comes after the tensor-parallel split and cuts what that has left.
    """
    if not isinstance(target, DTensor):
        return whole
    mesh = target.device_mesh
    for axis in reversed(range(mesh.ndim)):
        placement = target.placements[axis]
        if not placement.is_replicate():
            dim: int = placement.dim  # type: ignore[attr-defined]  # the two kinds of shard share no base class
            chunks = whole.chunk(mesh.size(axis), dim)
            place = mesh.get_local_rank(axis)
            whole = chunks[place] if place < len(chunks) else whole.narrow(dim, 0, 0)
    return whole


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return parameters in groups that lie on the same mesh: fused optimizers take no mixture."""
    groups: dict[object, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        groups[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    return list(groups.values())
