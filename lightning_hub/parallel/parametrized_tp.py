"""Tensor parallelism of layers with a parametrized weight: weight and parametrization are sharded together."""

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
    """A parametrization whose tensors can be sharded together with the weight."""

    def sharded_params(self, dim: int) -> dict[str, int]:
        """Return which of its parameters are sharded, and along which dim, when the weight is sharded along ``dim``.

        All others are replicated.
        """


class ParametrizedColwise(ColwiseParallel):
    """Shards the outputs of a layer over the ranks."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(
            module,
            device_mesh,
            partial(_shard, 0),
            partial(self._prepare_input_fn, self.input_layouts, self.desired_input_layouts),
            partial(self._prepare_output_fn, self.output_layouts, self.use_local_output),
        )


class ParametrizedRowwise(RowwiseParallel):
    """Shards the inputs of a layer over the ranks."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.desired_input_layouts = (Shard(-1),)
        return distribute_module(
            module,
            device_mesh,
            partial(_shard, 1),
            partial(self._prepare_input_fn, self.input_layouts, self.desired_input_layouts),
            partial(self._prepare_output_fn, self.output_layouts, self.use_local_output),
        )


def _shard(dim: int, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the tensors of a parametrized weight along a dim; `distribute_module` replicates all others."""
    if isinstance(module, ParametrizationList):
        _shard_parameter(module, "original", dim, mesh)
    elif isinstance(module, Shardable):
        for parameter, own_dim in module.sharded_params(dim).items():
            _shard_parameter(module, parameter, own_dim, mesh)
    elif not name and dim == 0 and module._parameters.get("bias") is not None:
        _shard_parameter(module, "bias", 0, mesh)


def _shard_parameter(module: nn.Module, name: str, dim: int, mesh: DeviceMesh) -> None:
    full: nn.Parameter = getattr(module, name)
    sharded = distribute_tensor(full, mesh, [Shard(dim)], src_data_rank=None)
    module.register_parameter(name, nn.Parameter(sharded, requires_grad=full.requires_grad))
