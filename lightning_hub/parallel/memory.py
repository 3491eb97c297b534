"""How much memory a strategy takes on each device, computed from shapes: nothing is allocated.

What lies in memory between steps (weights, gradients, optimizer state) is exact. What a step needs beside it follows
the order in which FSDP2 allocates and frees: a bound of the peak that does not know how an allocator rounds.
Activations, logits and what libraries keep for themselves are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from lightning.pytorch.strategies import Strategy
from torch import nn
from transformers import PreTrainedModel

from lightning_hub.parallel.fsdp import FSDPConfig, decoder_blocks, mixed_precision
from lightning_hub.parallel.strategies import MeshStrategy
from lightning_hub.parallel.tensor_parallel import layer_styles

ADAMW_MOMENTS = 2
"""Tensors that AdamW keeps for each weight, in the weight's dtype."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the device that holds most.

    Attributes:
        weights: Weights between steps.
        gradients: Their gradients, as the optimizer reads them.
        optimizer: The state of the optimizer.
        accumulated: Whole gradients that wait for the last row of a step.
        forward: Weights that are gathered or cast while a forward runs, at most.
        backward: The same in a backward, with gradients that are not yet shared out.
        is_offloaded: Whether weights, gradients and optimizer state lie in host memory.
    """

    weights: int
    gradients: int
    optimizer: int
    accumulated: int
    forward: int
    backward: int
    is_offloaded: bool = False

    @property
    def state(self) -> int:
        """What lies in memory between steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def at_work(self) -> int:
        """What a step needs beside it, at most."""
        return self.accumulated + max(self.forward, self.backward)

    @property
    def device(self) -> int:
        """What a device must have, activations and logits apart."""
        return self.at_work + (0 if self.is_offloaded else self.state)


def strategy_memory(
    model: PreTrainedModel,
    strategy: Strategy | str,
    world_size: int,
    *,
    precision: str = "32-true",
    has_several_rows: bool = False,
    moments: int = ADAMW_MOMENTS,
) -> Memory:
    """Return what a strategy takes on a device.

    Args:
        model: The model on the meta device, in the dtype of its weights, with ``requires_grad`` as it will train.
        strategy: A strategy of ours, made but not started; anything else holds a whole model, as DDP does.
        world_size: Processes, one device each.
        precision: The trainer's precision.
        has_several_rows: Whether a rank runs several rows in a step.
        moments: Tensors of optimizer state for each trained weight.

    Raises:
        ConfigError: The mesh does not fit the world, or the model has no tensor-parallel plan.
    """
    axes = strategy.axes(world_size) if isinstance(strategy, MeshStrategy) else {}
    tp, shards = axes.get("tp", 1), axes.get("fsdp", 1)
    split = _after_split(model, tp)
    held = {name: math.ceil(shape[0] / shards) * math.prod(shape[1:]) for name, shape in split.items()}
    parameters = dict(model.named_parameters())
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    size = {name: held[name] * parameter.itemsize for name, parameter in parameters.items()}
    weights, gradients = sum(size.values()), sum(size[name] for name in trained)
    whole = {name: math.prod(shape) for name, shape in split.items()}
    if isinstance(strategy, MeshStrategy) and ("tp" not in axes or shards > 1):
        work = _StepMemory(model, whole, strategy.fsdp_config, precision)
        forward, backward = work.forward(), work.backward()
        accumulated = 0 if strategy.fsdp_config.sync_every_row or not has_several_rows else work.gradients(whole)
    else:
        forward = backward = _autocast_copies(model, whole, precision)
        accumulated = 0
    offloaded = isinstance(strategy, MeshStrategy) and strategy.fsdp_config.cpu_offload
    return Memory(weights, gradients, moments * gradients, accumulated, forward, backward, offloaded)


def _after_split(model: PreTrainedModel, tp: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter on a rank of a tensor-parallel group, before it is sharded."""
    styles = layer_styles(model, tp) if tp > 1 else {}
    shapes = {}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        dim = {("colwise", "weight"): 0, ("colwise", "bias"): 0, ("rowwise", "weight"): 1}.get(
            (styles.get(module, ""), leaf)
        )
        shapes[name] = tuple(size // tp if place == dim else size for place, size in enumerate(parameter.shape))
    return shapes


class _StepMemory:
    """What a step of FSDP2 holds beside its shards.

    Args:
        model: The model.
        whole: Numbers of each parameter on this rank when it is gathered.
        sharding: How the model is sharded.
        precision: The trainer's precision.
    """

    def __init__(self, model: PreTrainedModel, whole: dict[str, int], sharding: FSDPConfig, precision: str) -> None:
        policy = mixed_precision(precision)
        self.parameters = dict(model.named_parameters())
        self.whole = whole
        self.sharding = sharding
        self.gathered_size = policy.param_dtype.itemsize if policy.param_dtype else None
        self.reduced_size = policy.reduce_dtype.itemsize if policy.reduce_dtype else None
        blocks = decoder_blocks(model)
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.blocks = [[names[id(parameter)] for parameter in block.parameters()] for block in blocks]
        inside = {name for block in self.blocks for name in block}
        self.root = [name for name in whole if name not in inside]
        self.block = max(self.blocks, key=lambda block: self._bytes(block, self.gathered_size))

    def forward(self) -> int:
        """The root, one block as it is used, and the flat buffers that it and those ahead arrive in."""
        buffers = min(1 + self.sharding.prefetch, len(self.blocks)) * self._bytes(self.block, self.gathered_size)
        return self._kept() + buffers + (self._bytes(self.block, self.gathered_size) if self._lets_go else 0)

    def backward(self) -> int:
        """A block gathered, its gradients, and these once more as they are sent; or the same of the root, at the end.

        What blocks are gathered for their backward, one ahead, does not depend on ``prefetch``.
        """
        gathered = 2 * self._bytes(self.block, self.gathered_size) if self._lets_go else 0
        leaving = self._trained_bytes(self.block, self.gathered_size) + self.gradients(self.block)
        of_root = self._trained_bytes(self.root, None)
        return self._kept() + of_root + max(gathered + leaving, self.gradients(self.root))

    def gradients(self, names: Iterable[str]) -> int:
        """Whole gradients of some parameters, as they are summed."""
        return self._trained_bytes(names, self.reduced_size)

    @property
    def _lets_go(self) -> bool:
        return self.sharding.reshard_after_forward is not False

    def _kept(self) -> int:
        """What stays gathered from the forward to the backward: the root, and what blocks do not let go of."""
        root, again = self._bytes(self.root, None), self.sharding.reshard_after_forward
        if again is True:
            return root
        every = sum(self._bytes(block, self.gathered_size) for block in self.blocks)
        return root + (every if again is False else math.ceil(every / again))

    def _bytes(self, names: Iterable[str], itemsize: int | None) -> int:
        return sum(self.whole[name] * (itemsize or self.parameters[name].itemsize) for name in names)

    def _trained_bytes(self, names: Iterable[str], itemsize: int | None) -> int:
        return self._bytes([name for name in names if self.parameters[name].requires_grad], itemsize)


def _autocast_copies(model: PreTrainedModel, whole: dict[str, int], precision: str) -> int:
    """Return what autocast keeps of weights that are not gathered in its dtype: a copy of each linear layer's.

    The output layer is left out with the logits.
    """
    if precision != "bf16-mixed":
        return 0
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    layers = {id(parameter) for module in linear for parameter in module.parameters(recurse=False)}
    cast = [name for name, parameter in model.named_parameters() if id(parameter) in layers]
    return sum(torch.bfloat16.itemsize * whole[name] for name in cast)
