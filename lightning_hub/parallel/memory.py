"""Computes the memory that a strategy needs on each device, from shapes alone: nothing is allocated.

The memory between steps (weights, gradients, optimizer state) is exact. The memory of a step is an upper bound of the
peak, from the order in which FSDP2 allocates and frees, without the rounding of an allocator. Activations, logits and
buffers of libraries are not included.
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
"""Number of tensors that AdamW stores for each weight, in the dtype of the weight."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the device that needs most.

    Attributes:
        weights: Weights between steps.
        gradients: Their gradients, as the optimizer reads them.
        optimizer: The state of the optimizer.
        accumulated: Full gradients that are not reduced before the last micro-batch of a step.
        forward: Weights that are gathered or cast during a forward, at most.
        backward: The same during a backward, with gradients that are not yet reduced.
        is_offloaded: Whether weights, gradients and optimizer state are in host memory.
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
        """Bytes between steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def at_work(self) -> int:
        """Bytes that a step needs in addition, at most."""
        return self.accumulated + max(self.forward, self.backward)

    @property
    def device(self) -> int:
        """Bytes that a device needs, without activations and logits."""
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
    """Return the memory that a strategy needs on one device.

    Args:
        model: The model on the meta device, in the dtype of its weights, with ``requires_grad`` as it will train.
        strategy: One of our strategies, not set up yet; every other one has a full model on each device, like DDP.
        world_size: Number of ranks, with one device each.
        precision: The trainer's precision.
        has_several_rows: Whether a rank runs several micro-batches in a step.
        moments: Tensors of optimizer state for each trained weight.

    Raises:
        ConfigError: The mesh does not fit the world size, or the model has no tensor-parallel plan.
    """
    axes = strategy.axes(world_size) if isinstance(strategy, MeshStrategy) else {}
    tp, shards = axes.get("tp", 1), axes.get("fsdp", 1)
    split = _after_split(model, tp)
    sharded = {name: math.ceil(shape[0] / shards) * math.prod(shape[1:]) for name, shape in split.items()}
    parameters = dict(model.named_parameters())
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    size = {name: sharded[name] * parameter.itemsize for name, parameter in parameters.items()}
    weights, gradients = sum(size.values()), sum(size[name] for name in trained)
    full = {name: math.prod(shape) for name, shape in split.items()}
    if isinstance(strategy, MeshStrategy) and ("tp" not in axes or shards > 1):
        work = _StepMemory(model, full, strategy.fsdp_config, precision)
        forward, backward = work.forward(), work.backward()
        accumulated = 0 if strategy.fsdp_config.sync_every_row or not has_several_rows else work.gradients(full)
    else:
        forward = backward = _autocast_copies(model, full, precision)
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
    """The memory that a step of FSDP2 needs in addition to the shards.

    Args:
        model: The model.
        full: Number of elements of each parameter on this rank when it is gathered.
        sharding: How the model is sharded.
        precision: The trainer's precision.
    """

    def __init__(self, model: PreTrainedModel, full: dict[str, int], sharding: FSDPConfig, precision: str) -> None:
        policy = mixed_precision(precision)
        self.parameters = dict(model.named_parameters())
        self.full = full
        self.sharding = sharding
        self.gathered_size = policy.param_dtype.itemsize if policy.param_dtype else None
        self.reduced_size = policy.reduce_dtype.itemsize if policy.reduce_dtype else None
        blocks = decoder_blocks(model)
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.blocks = [[names[id(parameter)] for parameter in block.parameters()] for block in blocks]
        inside = {name for block in self.blocks for name in block}
        self.root = [name for name in full if name not in inside]
        self.block = max(self.blocks, key=lambda block: self._bytes(block, self.gathered_size))

    def forward(self) -> int:
        """The root, one gathered block, and the flat buffers of the all-gathers of this block and of those ahead."""
        buffers = min(1 + self.sharding.prefetch, len(self.blocks)) * self._bytes(self.block, self.gathered_size)
        return self._stays_gathered() + buffers + (self._bytes(self.block, self.gathered_size) if self._reshards else 0)

    def backward(self) -> int:
        """One gathered block, its gradients, and these again in the buffer of the reduce; at the end those of the root.

        One block ahead is gathered for its backward; this does not depend on ``prefetch``.
        """
        gathered = 2 * self._bytes(self.block, self.gathered_size) if self._reshards else 0
        reduced = self._trained_bytes(self.block, self.gathered_size) + self.gradients(self.block)
        of_root = self._trained_bytes(self.root, None)
        return self._stays_gathered() + of_root + max(gathered + reduced, self.gradients(self.root))

    def gradients(self, names: Iterable[str]) -> int:
        """Full gradients of some parameters, in the dtype of the reduce."""
        return self._trained_bytes(names, self.reduced_size)

    @property
    def _reshards(self) -> bool:
        return self.sharding.reshard_after_forward is not False

    def _stays_gathered(self) -> int:
        """What stays gathered from the forward to the backward: the root, and blocks that do not reshard."""
        root, again = self._bytes(self.root, None), self.sharding.reshard_after_forward
        if again is True:
            return root
        every = sum(self._bytes(block, self.gathered_size) for block in self.blocks)
        return root + (every if again is False else math.ceil(every / again))

    def _bytes(self, names: Iterable[str], itemsize: int | None) -> int:
        return sum(self.full[name] * (itemsize or self.parameters[name].itemsize) for name in names)

    def _trained_bytes(self, names: Iterable[str], itemsize: int | None) -> int:
        return self._bytes([name for name in names if self.parameters[name].requires_grad], itemsize)


def _autocast_copies(model: PreTrainedModel, full: dict[str, int], precision: str) -> int:
    """Return the bytes of the copies that autocast makes of linear weights that are not gathered in its dtype.

    The output layer is not included, like the logits.
    """
    if precision != "bf16-mixed":
        return 0
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    layers = {id(parameter) for module in linear for parameter in module.parameters(recurse=False)}
    cast = [name for name, parameter in model.named_parameters() if id(parameter) in layers]
    return sum(torch.bfloat16.itemsize * full[name] for name in cast)
