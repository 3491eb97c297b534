"""The live tensors of a training by name, and filling them again: the same in every topology.

The optimizer's state goes by the names of weights and not by its groups, which differ from mesh to mesh. Its settings
and the schedule come from the recipe; of the schedule only the step is kept.
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
    """A module that says which of its tensors a checkpoint holds; of another it holds all."""

    def checkpoint_state_dict(self) -> dict[str, Tensor]:
        """Return live tensors, each under all of its names."""


def weights(module: nn.Module) -> dict[str, Shard]:
    """Return this rank's parts of all weights; tied weights are the same object under two names."""
    state = _state(module)
    parts = {id(tensor): part(tensor) for tensor in state.values()}
    return {name: parts[id(tensor)] for name, tensor in state.items()}


def optimizer_state(module: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, Shard]:
    """Return this rank's parts of the optimizers' tensors, as ``name of the weight/key``."""
    names = _names(module)
    return {
        f"{names[id(parameter)]}/{key}": part(torch.as_tensor(value))
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def part(tensor: Tensor) -> Shard:
    """Return what this rank holds of a tensor."""
    tensor = tensor.detach()
    return Shard(local_tensor(tensor), shard_offsets(tensor), tuple(tensor.shape))


def load_weights(module: nn.Module, stored: TensorReader) -> None:
    """Fill this rank's part of every weight in place.

    Raises:
        HubError: What is stored are not the weights of this model.
    """
    for name in set(stored.names()) - _state(module).keys():
        _make_room(module, name, stored)
    state = _state(module)
    unknown = sorted(set(stored.names()) - state.keys())
    if unknown:
        message = f"the checkpoint holds {unknown[0]}, which the model has not"
        raise ConfigError(message, where="--resume", remedy="resume with its model, method and options")
    for name, tensor in {id(tensor): (name, tensor) for name, tensor in state.items()}.values():
        stored.fill(name, part(tensor))


def _make_room(module: nn.Module, name: str, stored: TensorReader) -> None:
    """Give a buffer that a module may have or not the memory for what is stored of it."""
    path, _, leaf = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:  # the checkpoint is of another model
        return
    if leaf in owner._buffers and owner._buffers[leaf] is None:
        device = next((local_tensor(parameter).device for parameter in owner.parameters()), None)
        owner._buffers[leaf] = torch.empty(stored.shape(name), device=device)


def load_optimizer_state(module: nn.Module, optimizer: Optimizer, stored: TensorReader) -> None:
    """Give an optimizer that has made no step the state that is stored; it keeps the settings that it has."""
    names, keys = _names(module), _keys(stored)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for place, parameter in enumerate(parameters):
        name = names[id(parameter)]
        for key in keys.get(name, ()):
            whole = stored.shape(f"{name}/{key}") == tuple(parameter.shape)
            value = torch.empty_like(parameter) if whole else torch.empty(stored.shape(f"{name}/{key}"))
            stored.fill(f"{name}/{key}", part(value))
            state.setdefault(place, {})[key] = value.detach()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def set_scheduler_step(scheduler: LambdaLR, step: int) -> None:
    """Let a schedule stand after ``step`` steps, whatever its learning rates were before."""
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    progress = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    scheduler.load_state_dict({**scheduler.state_dict(), **progress})


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Return the live tensors that are kept; asking for them makes full sharding let go of gathered weights."""
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
