"""The strategies: data parallel, fully sharded, and fully sharded with tensor parallel."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lightning_hub.config.bounds import Bounds
from lightning_hub.config.resolved import ClassConfig
from lightning_hub.errors import ConfigError
from lightning_hub.launch.mesh import STRATEGY, check_mesh, check_replicas, read_mesh
from lightning_hub.launch.topology import mesh_of
from lightning_hub.parallel.data_parallel import DataParallel, DistributedCheckpointIO, HubStrategy
from lightning_hub.parallel.fsdp import FSDPConfig
from lightning_hub.parallel.lightning_internals import set_up_mesh
from lightning_hub.parallel.tensor_parallel import parallelize_layers


class DDP(HubStrategy, DDPStrategy):
    """A full model on every rank; gradients are averaged after the last micro-batch of a step.

    Gradients are views of the all-reduce buckets, which saves one copy of them. Buffers are not broadcast before each
    step: they are constants, or depend on the lengths of the documents of a rank. ``static_graph`` is not used: the
    number of micro-batches, and so of uses of a weight, differs from step to step.
    """

    short_name = "ddp"

    def __init__(self) -> None:
        # load_and_shard has given every rank the weights: DDP need not broadcast them again.
        super().__init__(gradient_as_bucket_view=True, broadcast_buffers=False, init_sync=False)


class MeshStrategy(HubStrategy, ModelParallelStrategy):
    """Base class of the strategies that shard weights: it makes a mesh with named axes.

    Args:
        sharding: How weights are sharded over the data-parallel axes.
    """

    def __init__(self, sharding: FSDPConfig) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False)
        self.fsdp_config = sharding
        self._parallelized: PreTrainedModel | None = None

    def axes(self, world_size: int) -> dict[str, int]:
        """Return the names and sizes of the mesh's axes, outermost first.

        Raises:
            ConfigError: The sizes do not fit the world size.
        """
        raise NotImplementedError

    def setup_environment(self) -> None:
        """Initialise the process group and make the mesh."""
        set_up_mesh(self, self.axes(self.num_nodes * self.num_processes))

    @property
    def data_parallel(self) -> DataParallel:
        """The data-parallel rank of this process: its position on all axes but ``tp``."""
        names = self.device_mesh.mesh_dim_names or ()
        if "tp" not in names:
            return DataParallel(self.global_rank, self.world_size)
        mesh = self.device_mesh["fsdp"]
        return DataParallel(mesh.get_local_rank(), mesh.size(), mesh.get_group())

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """The data-parallel rank and size, for samplers of Lightning."""
        return {"num_replicas": self.data_parallel.size, "rank": self.data_parallel.rank}

    @property
    def weights_device(self) -> torch.device:
        """The device of the weights between steps."""
        return torch.device("cpu") if self.fsdp_config.cpu_offload else self.root_device

    def parallelize(self, model: PreTrainedModel) -> None:
        """Shard the layers over ``tp``, then shard the result over the other axes."""
        names = self.device_mesh.mesh_dim_names or ()
        if "tp" in names and self.device_mesh["tp"].size() > 1:
            parallelize_layers(model, self.device_mesh["tp"], self.lightning_module)
        sharded = self._sharded_mesh(names)
        if sharded is not None:
            self.fsdp_config.apply(model, sharded, str(self.precision_plugin.precision))
        self._parallelized = model

    def _sharded_mesh(self, names: tuple[str, ...]) -> DeviceMesh | None:
        if "tp" not in names:
            return self.device_mesh
        mesh = self.device_mesh["fsdp"]
        return mesh if mesh.size() > 1 else None

    def model_to_device(self) -> None:
        """Move the module to its device, but leave offloaded weights on the host."""
        assert self.model is not None
        if not self.fsdp_config.cpu_offload:
            super().model_to_device()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights of this rank; nothing is gathered."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an empty dict: CheckpointSaver saves the state of the optimizer by the names of the weights."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: object = None) -> None:
        """Make every rank write its shards.

        Raises:
            ConfigError: Only rank 0 can write the checkpoint format.
        """
        if not isinstance(self.checkpoint_io, DistributedCheckpointIO):
            message = f"{type(self.checkpoint_io).__name__} cannot save a model that is sharded over several ranks"
            raise ConfigError(message, where="trainer.plugins", remedy="use FolderCheckpointIO")
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint with its checkpoint IO."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load weights as other strategies do; a checkpoint without weights is an error."""
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def no_gradient_sync(self) -> AbstractContextManager[None]:
        """Return a context in which gradients are not reduced over ranks."""
        return nullcontext() if self._parallelized is None else self.fsdp_config.no_gradient_sync(self._parallelized)


class FSDP(MeshStrategy):
    """Weights, gradients and optimizer state sharded over all ranks (FSDP2).

    Args:
        reshard_after_forward: Free the gathered weights of a block after its forward, and gather them again for its
            backward. false keeps them: faster, with memory for one full model more. A number gathers them again
            within groups of so many ranks.
        sync_every_row: Reduce gradients after every micro-batch of a step: more communication, and memory for one
            full set of gradients less if a step has several micro-batches.
        cpu_offload: Keep weights, gradients and optimizer state in host memory.
        prefetch: How many blocks are gathered ahead in the forward.
        replicas: Number of groups of ranks; each group has one full model, sharded over its ranks (hybrid sharding).
    """

    short_name = "fsdp"

    def __init__(
        self,
        reshard_after_forward: bool | int = True,
        sync_every_row: bool = False,
        cpu_offload: bool = False,
        prefetch: Annotated[int, Bounds(">= 1")] = 1,
        replicas: Annotated[int, Bounds(">= 1")] = 1,
    ) -> None:
        super().__init__(FSDPConfig(reshard_after_forward, sync_every_row, cpu_offload, prefetch))
        self.replicas = replicas

    def axes(self, world_size: int) -> dict[str, int]:
        """Return one axis of all ranks, or one of replicas and one of the shards of each."""
        check_replicas(self.replicas, world_size)
        if self.replicas == 1:
            return {"fsdp": world_size}
        return {"replicate": self.replicas, "fsdp": world_size // self.replicas}


class ModelParallel(MeshStrategy):
    """Layers sharded within groups of ranks (tensor parallel), and all weights over the groups (FSDP2).

    Args:
        mesh_shape: Sizes and names of the axes, [[4, 2], [fsdp, tp]]; ranks of one tp group are neighbours.
        reshard_after_forward: As for FSDP.
        sync_every_row: As for FSDP.
        cpu_offload: As for FSDP.
        prefetch: As for FSDP.
    """

    short_name = "model_parallel"

    def __init__(
        self,
        mesh_shape: tuple[list[int], list[str]],
        reshard_after_forward: bool | int = True,
        sync_every_row: bool = False,
        cpu_offload: bool = False,
        prefetch: Annotated[int, Bounds(">= 1")] = 1,
    ) -> None:
        super().__init__(FSDPConfig(reshard_after_forward, sync_every_row, cpu_offload, prefetch))
        self.mesh = read_mesh(mesh_shape)

    def axes(self, world_size: int) -> dict[str, int]:
        """Return the two axes of the recipe's mesh."""
        check_mesh(self.mesh, world_size)
        return {"fsdp": self.mesh.fsdp, "tp": self.mesh.tp}


def strategy_for(value: str | Strategy | None, world_size: int) -> str | Strategy:
    """Return the strategy for the value of ``trainer.strategy`` in a recipe, before a trainer exists.

    Args:
        value: A name, a strategy that the parser has made, or None.
        world_size: Number of ranks of the run.

    Raises:
        ConfigError: The name is unknown, or the strategy does not fit the number of ranks.
    """
    if value is None or value == "auto":
        return DDP() if world_size > 1 else "auto"
    classes: dict[str, type[DDP] | type[FSDP]] = {"ddp": DDP, "fsdp": FSDP}
    if isinstance(value, str):
        mesh_of(ClassConfig(value), world_size)
        if value not in classes:
            raise ConfigError(f"{value!r} is not a strategy", where=STRATEGY, remedy="use ddp, fsdp or a class")
        return classes[value]()
    if isinstance(value, MeshStrategy):
        value.axes(world_size)
    return value
