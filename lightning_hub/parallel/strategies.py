"""The strategies: data parallel, fully sharded, and fully sharded times tensor parallel."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lightning_hub.errors import ConfigError
from lightning_hub.launch.mesh import STRATEGY, check_mesh, check_replicas, read_mesh
from lightning_hub.launch.topology import mesh_of
from lightning_hub.parallel.data_parallel import DataParallel, DistributedCheckpointIO, HubStrategy
from lightning_hub.parallel.fsdp import FSDPConfig
from lightning_hub.parallel.lightning_internals import set_up_mesh
from lightning_hub.parallel.tensor_parallel import parallelize_layers


class DDP(HubStrategy, DDPStrategy):
    """A whole model on every rank; gradients are averaged after the last row of a step.

    Gradients live in the buckets they travel in, which saves one copy of them. Buffers are not sent before each step:
    they are constants, or follow the lengths of a rank's own rows. The graph is not called static: the number of
    rows, and so of uses of a weight, differs from step to step.
    """

    short_name = "ddp"

    def __init__(self) -> None:
        # Every rank has been filled by the start: weights need not be sent once more.
        super().__init__(gradient_as_bucket_view=True, broadcast_buffers=False, init_sync=False)


class MeshStrategy(HubStrategy, ModelParallelStrategy):
    """What the strategies with cut weights share: a mesh of named axes, made when the processes know each other.

    Args:
        sharding: How the data-parallel axes are fully sharded.
    """

    def __init__(self, sharding: FSDPConfig) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False)
        self.fsdp_config = sharding
        self._parallelized: PreTrainedModel | None = None

    def axes(self, world_size: int) -> dict[str, int]:
        """Return the names and sizes of the mesh's axes, outermost first.

        Raises:
            ConfigError: They do not make up the world.
        """
        raise NotImplementedError

    def setup_environment(self) -> None:
        """Join the other processes and make the mesh."""
        set_up_mesh(self, self.axes(self.num_nodes * self.num_processes))

    @property
    def data_parallel(self) -> DataParallel:
        """This process among those that share out the data: all that differ in another axis than ``tp``."""
        names = self.device_mesh.mesh_dim_names or ()
        if "tp" not in names:
            return DataParallel(self.global_rank, self.world_size)
        mesh = self.device_mesh["fsdp"]
        return DataParallel(mesh.get_local_rank(), mesh.size(), mesh.get_group())

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """Tell Lightning the data-parallel ranks, for loaders that are not ours."""
        return {"num_replicas": self.data_parallel.size, "rank": self.data_parallel.rank}

    @property
    def weights_device(self) -> torch.device:
        """Where weights lie between steps."""
        return torch.device("cpu") if self.fsdp_config.cpu_offload else self.root_device

    def parallelize(self, model: PreTrainedModel) -> None:
        """Split the layers over ``tp``, then shard what that has left over the other axes."""
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
        """Leave the weights where the start has put them."""
        assert self.model is not None
        if not self.fsdp_config.cpu_offload:
            super().model_to_device()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return this rank's own weights, as they lie; nothing is gathered."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return nothing: who saves takes the optimizer's state by the names of the weights."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: object = None) -> None:
        """Let every rank write its part.

        Raises:
            ConfigError: The checkpoint format is one that rank 0 writes alone.
        """
        if not isinstance(self.checkpoint_io, DistributedCheckpointIO):
            message = f"{type(self.checkpoint_io).__name__} cannot save a model whose parts lie on several ranks"
            raise ConfigError(message, where="trainer.plugins", remedy="use FolderCheckpointIO")
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint as its format does."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load weights, or refuse a checkpoint that does not bring them, as every other strategy does."""
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def no_gradient_sync(self) -> AbstractContextManager[None]:
        """Return a context in which gradients stay on this rank."""
        return nullcontext() if self._parallelized is None else self.fsdp_config.no_gradient_sync(self._parallelized)


class FSDP(MeshStrategy):
    """Weights, gradients and optimizer state sharded over all ranks (FSDP2).

    Args:
        reshard_after_forward: Let go of a block's weights after its forward and gather them again for its backward.
            false keeps them: faster, and one whole model more memory. A number gathers again within groups of so
            many ranks.
        sync_every_row: Exchange gradients after every row of a step: more traffic, and one whole set of gradients
            less memory where a step has several rows.
        cpu_offload: Keep weights, gradients and optimizer state in host memory.
        prefetch: How many blocks are gathered ahead in the forward.
        replicas: Ranks form so many groups, each with a whole model between its members (hybrid sharding).
    """

    short_name = "fsdp"

    def __init__(
        self,
        reshard_after_forward: bool | int = True,
        sync_every_row: bool = False,
        cpu_offload: bool = False,
        prefetch: int = 1,
        replicas: int = 1,
    ) -> None:
        super().__init__(FSDPConfig(reshard_after_forward, sync_every_row, cpu_offload, prefetch))
        self.replicas = replicas

    def axes(self, world_size: int) -> dict[str, int]:
        """Return one axis of all ranks, or replicas and the parts of each."""
        check_replicas(self.replicas, world_size)
        if self.replicas == 1:
            return {"fsdp": world_size}
        return {"replicate": self.replicas, "fsdp": world_size // self.replicas}


class ModelParallel(MeshStrategy):
    """Layers split within groups of ranks (tensor parallel), everything sharded over the groups (FSDP2).

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
        prefetch: int = 1,
    ) -> None:
        super().__init__(FSDPConfig(reshard_after_forward, sync_every_row, cpu_offload, prefetch))
        self.mesh = read_mesh(mesh_shape)

    def axes(self, world_size: int) -> dict[str, int]:
        """Return the two axes of the recipe's mesh."""
        check_mesh(self.mesh, world_size)
        return {"fsdp": self.mesh.fsdp, "tp": self.mesh.tp}


def strategy_for(value: str | Strategy | None, world_size: int) -> str | Strategy:
    """Return the strategy that a recipe's ``trainer.strategy`` means, before a trainer exists.

    Args:
        value: A word, a strategy that the parser has made, or nothing.
        world_size: Processes of the run.

    Raises:
        ConfigError: The word is unknown, or the strategy does not fit the number of processes.
    """
    if value is None or value == "auto":
        return DDP() if world_size > 1 else "auto"
    words: dict[str, type[DDP] | type[FSDP]] = {"ddp": DDP, "fsdp": FSDP}
    if isinstance(value, str):
        mesh_of(value, world_size)
        if value not in words:
            raise ConfigError(f"no strategy {value!r}", where=STRATEGY, remedy="use ddp, fsdp or a class")
        return words[value]()
    if isinstance(value, MeshStrategy):
        value.axes(world_size)
    return value
