"""Tensor parallelism by the plan of the model: which layers are sharded by columns, and which by rows."""

from __future__ import annotations

import re
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn.utils.parametrize import is_parametrized
from transformers import PretrainedConfig, PreTrainedModel

from lightning_hub.errors import ConfigError
from lightning_hub.launch.mesh import STRATEGY, check_divisible
from lightning_hub.parallel.parametrized_tp import ParametrizedColwise, ParametrizedRowwise


class SumGradients(ParallelStyle):
    """For a replicated weight that each rank uses for its own heads only: its gradients are all-reduced (sum)."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        group = device_mesh.get_group()

        def summed(gradient: Tensor) -> Tensor:
            total = gradient.clone()
            torch.distributed.all_reduce(total, group=group)
            return total

        def watch(module: nn.Module, args: object) -> None:
            """Add a hook to the parameter of this forward: FSDP replaces the parameter after the start."""
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad and not getattr(parameter, "is_summed", False):
                    parameter.register_hook(summed)
                    parameter.is_summed = True  # type: ignore[attr-defined]

        module.register_forward_pre_hook(watch)
        return module


STYLES: dict[str, type[ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "replicated_with_grad_allreduce": SumGradients,
}
"""The supported styles of plans."""

PARAMETRIZED_STYLES: dict[str, type[ParallelStyle]] = {
    **STYLES,
    "colwise": ParametrizedColwise,
    "rowwise": ParametrizedRowwise,
}
"""The same for layers with a parametrized weight."""

WHOLE_STYLES = ("colwise_rep", "colwise_gather_output", "embedding_rowwise", "embedding_colwise")
"""Styles of embeddings and output layers, which are replicated: the loss needs their full weights."""


@runtime_checkable
class HasTensorParallelPlan(Protocol):
    """A module whose method replaces layers of a model."""

    def tensor_parallel_plan(self, name: str, layer: nn.Module, style: str) -> dict[str, str]:
        """Return which modules of a layer are sharded, each with its style; the plan of the model gives ``style``."""


def parallelize_layers(model: PreTrainedModel, mesh: DeviceMesh, module: object = None) -> None:
    """Shard the layers of a model over the ranks of a mesh with one axis, by the plan of the model.

    Args:
        model: The model.
        mesh: The ranks of one tensor-parallel group.
        module: The module that trains the model; it may define how its own layers are sharded.
    """
    names = layer_styles(model, mesh.size())
    if isinstance(module, HasTensorParallelPlan):
        plans = [module.tensor_parallel_plan(name, model.get_submodule(name), style) for name, style in names.items()]
        names = {part: style for plan in plans for part, style in plan.items()}
    styles: dict[str, Any] = {name: _style(model.get_submodule(name), style) for name, style in names.items()}
    parallelize_module(model, mesh, styles, src_data_rank=None)


def _style(layer: nn.Module, name: str) -> ParallelStyle:
    """Return the style of a layer by its name; a parametrized weight is sharded with its parametrization."""
    return (PARAMETRIZED_STYLES if is_parametrized(layer) else STYLES)[name]()


def layer_styles(model: PreTrainedModel, tp: int) -> dict[str, str]:
    """Return the layers that are sharded over ``tp`` ranks, each with its style in the plan of the model.

    Raises:
        ConfigError: The model has no supported plan, or ``tp`` does not divide its sizes.
    """
    check_divisible(model.config, tp)
    plan = check_plan(model.config, getattr(model, "_tp_plan", None) or {})
    patterns = {re.compile(re.escape(name).replace(r"\*", r"\d+")): style for name, style in plan.items()}
    return {
        name: style
        for name, _ in model.named_modules()
        for pattern, style in patterns.items()
        if pattern.fullmatch(name)
    }


def check_model(config: PretrainedConfig, tp: int) -> None:
    """Reject a model that cannot be sharded over ``tp`` ranks, by its configuration alone.

    Raises:
        ConfigError: It has no plan, or an unsupported one, or a size that ``tp`` does not divide.
    """
    check_plan(config, getattr(config, "base_model_tp_plan", None) or {})
    check_divisible(config, tp)


def check_plan(config: PretrainedConfig, plan: dict[str, str]) -> dict[str, str]:
    """Return the entries of a tensor-parallel plan that shard layers.

    Raises:
        ConfigError: There is none, or one has an unsupported style.
    """
    remedy = "use the strategy fsdp or ddp"
    layers = {name: style for name, style in plan.items() if style not in WHOLE_STYLES}
    if not layers:
        raise ConfigError(
            f"models of type {config.model_type} have no tensor-parallel plan", where=STRATEGY, remedy=remedy
        )
    unknown = sorted(set(layers.values()) - STYLES.keys())
    if unknown:
        message = f"the tensor-parallel plan of {config.model_type} uses {', '.join(unknown)}, which is not supported"
        raise ConfigError(message, where=STRATEGY, remedy=remedy)
    return layers
