"""Returns the live tensors of a training by name, and loads them again, in every topology.

The state of the optimizer is stored by the names of weights, not by its parameter groups, which depend on the mesh. The
settings of optimizer and schedule come from the recipe; of the schedule only the step is stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_hub.checkpoints.tensors import Shard, TensorReader
from lightning_hub.errors import ConfigError
from lightning_hub.parallel.dtensor import local_tensor, shard_offsets


@runtime_checkable
class HasCheckpointState(Protocol):
    """A module that defines which of its tensors a checkpoint contains; of other modules it contains all."""

    def checkpoint_state_dict(self) -> dict[str, Tensor]:
        """Return live tensors; a tied tensor is listed under each of its names."""


def weights(module: nn.Module) -> dict[str, Shard]:
    """Return the shards of all weights on this rank; tied weights are the same object under two names."""
    state = _state(module)
    shards = {id(tensor): part(tensor) for tensor in state.values()}
    return {name: shards[id(tensor)] for name, tensor in state.items()}


def optimizer_state(module: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, Shard]:
    """Return the shards of the optimizers' tensors on this rank, as ``name of the weight/key``."""
    names = _names(module)
    return {
        f"{names[id(parameter)]}/{key}": part(torch.as_tensor(value))
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def part(tensor: Tensor) -> Shard:
    """Return the shard of a tensor on this rank."""
    tensor = tensor.detach()
    return Shard(local_tensor(tensor), shard_offsets(tensor), tuple(tensor.shape))


def load_weights(module: nn.Module, stored: TensorReader) -> None:
    """Load the shard of every weight on this rank in place.

    Raises:
        ConfigError: The checkpoint has a tensor that the model does not have.
        DamagedError: A weight is not stored, or has another shape.
    """
    for name in set(stored.names()) - _state(module).keys():
        _allocate_buffer(module, name, stored)
    state = _state(module)
    unknown = sorted(set(stored.names()) - state.keys())
    if unknown:
        message = f"the checkpoint has {unknown[0]}, which the model does not have"
        raise ConfigError(message, where="--resume", remedy="resume with its model, method and options")
    for name, tensor in {id(tensor): (name, tensor) for name, tensor in state.items()}.values():
        stored.fill(name, part(tensor))


def _allocate_buffer(module: nn.Module, name: str, stored: TensorReader) -> None:
    """Allocate a buffer that is None in the module but stored in the checkpoint."""
    path, _, leaf = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:  # the checkpoint is of another model
        return
    if leaf in owner._buffers and owner._buffers[leaf] is None:
        device = next((local_tensor(parameter).device for parameter in owner.parameters()), None)
        owner._buffers[leaf] = torch.empty(stored.shape(name), device=device)


def load_optimizer_state(module: nn.Module, optimizer: Optimizer, stored: TensorReader) -> None:
    """Load the stored state into an optimizer before its first step; its settings do not change."""
    names, keys = _names(module), _keys(stored)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(parameters):
        name = names[id(parameter)]
        for key in keys.get(name, ()):
            is_like_weight = stored.shape(f"{name}/{key}") == tuple(parameter.shape)  # else a scalar, such as the step
            value = torch.empty_like(parameter) if is_like_weight else torch.empty(stored.shape(f"{name}/{key}"))
            stored.fill(f"{name}/{key}", part(value))
            state.setdefault(index, {})[key] = value.detach()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def set_scheduler_step(scheduler: LambdaLR, step: int) -> None:
    """Set the scheduler, and the learning rates of its optimizer, to ``step`` finished steps."""
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    progress = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    scheduler.load_state_dict({**scheduler.state_dict(), **progress})


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Return the live tensors of a checkpoint; FSDP frees gathered weights when they are requested."""
    if isinstance(module, HasCheckpointState):
        return module.checkpoint_state_dict()
    state: dict[str, Tensor] = module.state_dict(keep_vars=True)
    return state


def _names(module: nn.Module) -> dict[int, str]:
    return {id(tensor): name for name, tensor in reversed(_state(module).items())}


def _keys(stored: TensorReader) -> dict[str, list[str]]:
    keys: dict[str, list[str]] = {}
    for entry in stored.names():
        name, _, key = entry.rpartition("/")
        keys.setdefault(name, []).append(key)
    return keys
