"""Tensor parallelism of layers whose weight has a change under it: weight and change are cut along the same axis."""

from __future__ import annotations

from functools import partial
from typing import Protocol, runtime_checkable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.nn.utils.parametrize import ParametrizationList


@runtime_checkable
class Shardable(Protocol):
    """A parametrization that knows how its own tensors follow a cut of the weight."""

    def sharded_params(self, axis: int) -> dict[str, int]:
        """Return which of its parameters are cut, and along which axis, when the weight is cut along ``axis``.

        The others stay whole on every rank.
        """


class ParametrizedColwise(ColwiseParallel):
    """Gives each rank some of the outputs of a layer."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(
            module,
            device_mesh,
            partial(_shard, 0),
            partial(self._prepare_input_fn, self.input_layouts, self.desired_input_layouts),
            partial(self._prepare_output_fn, self.output_layouts, self.use_local_output),
        )


class ParametrizedRowwise(RowwiseParallel):
    """Gives each rank some of the inputs of a layer."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.desired_input_layouts = (Shard(-1),)
        return distribute_module(
            module,
            device_mesh,
            partial(_shard, 1),
            partial(self._prepare_input_fn, self.input_layouts, self.desired_input_layouts),
            partial(self._prepare_output_fn, self.output_layouts, self.use_local_output),
        )


def _shard(axis: int, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    """Cut what belongs to a weight; torch makes whole tensors on every rank of all that is left."""
    if isinstance(module, ParametrizationList):
        _shard_parameter(module, "original", axis, mesh)
    elif isinstance(module, Shardable):
        for parameter, dim in module.sharded_params(axis).items():
            _shard_parameter(module, parameter, dim, mesh)
    elif not name and axis == 0 and module._parameters.get("bias") is not None:
        _shard_parameter(module, "bias", 0, mesh)


def _shard_parameter(module: nn.Module, name: str, dim: int, mesh: DeviceMesh) -> None:
    whole: nn.Parameter = getattr(module, name)
    part = distribute_tensor(whole, mesh, [Shard(dim)], src_data_rank=None)
    module.register_parameter(name, nn.Parameter(part, requires_grad=whole.requires_grad))
