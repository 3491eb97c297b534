"""Tensor parallelism by a model's own plan: which layers are cut by columns, and which by rows."""

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
    """A weight that every rank holds, used on each rank's own heads only: its gradients are summed."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        group = device_mesh.get_group()

        def summed(gradient: Tensor) -> Tensor:
            total = gradient.clone()
            torch.distributed.all_reduce(total, group=group)
            return total

        def watch(module: nn.Module, args: object) -> None:
            """Hook the parameter of this forward: full sharding swaps in another one than it was at the start."""
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
"""The words of plans that are offered."""

PARAMETRIZED_STYLES: dict[str, type[ParallelStyle]] = {
    **STYLES,
    "colwise": ParametrizedColwise,
    "rowwise": ParametrizedRowwise,
}
"""The same for layers whose weight has a change under it."""

WHOLE_STYLES = ("colwise_rep", "colwise_gather_output", "embedding_rowwise", "embedding_colwise")
"""Words for embeddings and output layers, which stay whole: the loss needs the weights themselves."""


@runtime_checkable
class HasTensorParallelPlan(Protocol):
    """A module whose method puts other layers in the place of a model's own."""

    def tensor_parallel_plan(self, name: str, layer: nn.Module, style: str) -> dict[str, str]:
        """Return which modules of a layer are cut, each with its style, where the model's plan gives it ``style``."""


def parallelize_layers(model: PreTrainedModel, mesh: DeviceMesh, module: object = None) -> None:
    """Cut the layers of a model over the ranks of a one-dimensional mesh, as the model's own plan says.

    Args:
        model: The model.
        mesh: The ranks that hold a layer together.
        module: The module that trains the model; it may say how layers of its own are cut.
    """
    words = layer_styles(model, mesh.size())
    if isinstance(module, HasTensorParallelPlan):
        plans = [module.tensor_parallel_plan(name, model.get_submodule(name), style) for name, style in words.items()]
        words = {part: word for plan in plans for part, word in plan.items()}
    styles: dict[str, Any] = {name: _style(model.get_submodule(name), word) for name, word in words.items()}
    parallelize_module(model, mesh, styles, src_data_rank=None)


def _style(layer: nn.Module, word: str) -> ParallelStyle:
    """Return how a layer is cut; one with a change under its weight is cut together with that."""
    return (PARAMETRIZED_STYLES if is_parametrized(layer) else STYLES)[word]()


def layer_styles(model: PreTrainedModel, tp: int) -> dict[str, str]:
    """Return the layers that are cut over ``tp`` ranks, each with its word of the model's plan.

    Raises:
        ConfigError: The model has no plan that is offered, or its sizes cannot be cut so.
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
    """Refuse a model that cannot be split over so many ranks, by its configuration alone.

    Raises:
        ConfigError: It has no plan, or one that is not offered, or a size that ``tp`` does not divide.
    """
    check_plan(config, getattr(config, "base_model_tp_plan", None) or {})
    check_divisible(config, tp)


def check_plan(config: PretrainedConfig, plan: dict[str, str]) -> dict[str, str]:
    """Return the part of a tensor-parallel plan that cuts layers.

    Raises:
        ConfigError: There is none, or it asks for something that is not offered.
    """
    remedy = "use the strategy fsdp or ddp"
    layers = {name: style for name, style in plan.items() if style not in WHOLE_STYLES}
    if not layers:
        raise ConfigError(
            f"models of type {config.model_type} bring no tensor-parallel plan", where=STRATEGY, remedy=remedy
        )
    unknown = sorted(set(layers.values()) - STYLES.keys())
    if unknown:
        message = f"the tensor-parallel plan of {config.model_type} asks for {', '.join(unknown)}, which is not offered"
        raise ConfigError(message, where=STRATEGY, remedy=remedy)
    return layers
