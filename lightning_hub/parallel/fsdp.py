"""Full sharding (FSDP2): every rank keeps a part of each weight and gathers a decoder block while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from transformers import PreTrainedModel

from lightning_hub.errors import ConfigError


@dataclass(frozen=True)
class FSDPConfig:
    """How a model is fully sharded.

    Attributes:
        reshard_after_forward: Whether a block's weights are let go of after its forward and gathered again for its
            backward; a number gathers them again within groups of so many ranks.
        sync_every_row: Whether gradients are exchanged after every row and not only after the last of a step.
        cpu_offload: Whether weights, gradients and optimizer state lie in host memory between uses.
        prefetch: How many blocks are gathered ahead in the forward.
    """

    reshard_after_forward: bool | int = True
    sync_every_row: bool = False
    cpu_offload: bool = False
    prefetch: int = 1

    def apply(self, model: PreTrainedModel, mesh: DeviceMesh, precision: str) -> None:
        """Shard every decoder block, and what is left, over a mesh: one axis, or replicas and parts.

        Args:
            model: The model, which has no memory yet.
            mesh: The data-parallel ranks.
            precision: The trainer's precision.
        """
        policy = mixed_precision(precision)
        offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if self.cpu_offload else OffloadPolicy()
        blocks = decoder_blocks(model)
        check_dtypes(model, blocks)
        for block in blocks:
            fully_shard(
                block,
                mesh=mesh,
                reshard_after_forward=self.reshard_after_forward,
                mp_policy=policy,
                offload_policy=offload,
            )
        rest = replace(policy, param_dtype=None)  # embeddings begin the residual stream, which stays in float32
        fully_shard(model, mesh=mesh, mp_policy=rest, offload_policy=offload)
        if self.prefetch > 1:  # one block ahead is what FSDP does by itself
            sharded: list[FSDPModule] = [block for block in blocks if isinstance(block, FSDPModule)]
            for place, current in enumerate(sharded):
                current.set_modules_to_forward_prefetch(sharded[place + 1 : place + 1 + self.prefetch])

    @contextmanager
    def no_gradient_sync(self, model: nn.Module) -> Iterator[None]:
        """Keep gradients on this rank while it lasts."""
        if self.sync_every_row or not isinstance(model, FSDPModule):
            yield
            return
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)


def check_dtypes(model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Refuse weights that train in several precisions within one group: gradients of a group travel together.

    Args:
        model: Before it is sharded.
        blocks: Its parts that are groups of their own.

    Raises:
        ConfigError: There are such, as norms in bfloat16 beside changes in float32.
    """
    groups = [dict.fromkeys(block.parameters()) for block in blocks]
    inside = {parameter for group in groups for parameter in group}
    for group in (*groups, [parameter for parameter in model.parameters() if parameter not in inside]):
        dtypes = sorted({str(one.dtype).removeprefix("torch.") for one in group if one.requires_grad})
        if len(dtypes) > 1:
            raise ConfigError(
                f"some weights train in {' and others in '.join(dtypes)}, which full sharding cannot exchange together",
                where="trainer.precision",
                remedy="use bf16-mixed, or train the adapters or changes alone",
            )


def mixed_precision(precision: str) -> MixedPrecisionPolicy:
    """Return what is computed and exchanged in which precision; weights and optimizer stay as they are.

    Mixed precision gathers bfloat16 copies of a block's float32 weights; autocast decides what is computed in them,
    as it does without sharding, so activations are not cast. Gradients are summed in float32 in every case.
    """
    if precision == "bf16-mixed":
        return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    return MixedPrecisionPolicy(reduce_dtype=torch.float32 if precision == "bf16-true" else None)


def decoder_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the blocks that the model itself calls indivisible, outermost ones only, in order."""
    names = set(model._no_split_modules or ())
    blocks: list[nn.Module] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if type(module).__name__ in names and not name.startswith(inside or ("\0",)):
            blocks.append(module)
            inside = (*inside, f"{name}.")
    return blocks
