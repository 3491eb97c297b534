"""Full sharding (FSDP2): every rank has a shard of each weight and gathers a decoder block while it runs."""

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
        reshard_after_forward: Whether the gathered weights of a block are freed after its forward and gathered again
            for its backward. A number: they are gathered again within groups of so many ranks.
        sync_every_row: Whether gradients are reduced after every micro-batch, and not only after the last of a step.
        cpu_offload: Whether weights, gradients and optimizer state are in host memory between uses.
        prefetch: How many blocks are gathered ahead in the forward.
    """

    reshard_after_forward: bool | int = True
    sync_every_row: bool = False
    cpu_offload: bool = False
    prefetch: int = 1

    def apply(self, model: PreTrainedModel, mesh: DeviceMesh, precision: str) -> None:
        """Shard every decoder block, and the other weights, over a mesh with one axis, or with replicas and shards.

        Args:
            model: The model on the meta device.
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
            for index, current in enumerate(sharded):
                current.set_modules_to_forward_prefetch(sharded[index + 1 : index + 1 + self.prefetch])

    @contextmanager
    def no_gradient_sync(self, model: nn.Module) -> Iterator[None]:
        """Do not reduce gradients over ranks within this context."""
        if self.sync_every_row or not isinstance(model, FSDPModule):
            yield
            return
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)


def check_dtypes(model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Reject trained weights with several dtypes in one FSDP group: their gradients are reduced as one buffer.

    Args:
        model: The model before it is sharded.
        blocks: Its modules that are groups.

    Raises:
        ConfigError: There is such a group, for example norms in bfloat16 and deltas in float32.
    """
    groups = [dict.fromkeys(block.parameters()) for block in blocks]
    inside = {parameter for group in groups for parameter in group}
    for group in (*groups, [parameter for parameter in model.parameters() if parameter not in inside]):
        dtypes = sorted({str(one.dtype).removeprefix("torch.") for one in group if one.requires_grad})
        if len(dtypes) > 1:
            raise ConfigError(
                f"some weights train in {' and others in '.join(dtypes)}, which FSDP cannot reduce together",
                where="trainer.precision",
                remedy="use precision bf16-mixed, or train only the adapters or deltas",
            )


def mixed_precision(precision: str) -> MixedPrecisionPolicy:
    """Return the dtypes in which FSDP gathers weights and reduces gradients; stored weights do not change.

    With mixed precision, bfloat16 copies of the float32 weights are gathered. Autocast decides which operations use
    them, as without sharding, so activations are not cast. Gradients are always summed in float32.
    """
    if precision == "bf16-mixed":
        return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    return MixedPrecisionPolicy(reduce_dtype=torch.float32 if precision == "bf16-true" else None)


def decoder_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules in ``_no_split_modules`` of the model, outermost ones only, in order."""
    names = set(model._no_split_modules or ())
    blocks: list[nn.Module] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if type(module).__name__ in names and not name.startswith(inside or ("\0",)):
            blocks.append(module)
            inside = (*inside, f"{name}.")
    return blocks
