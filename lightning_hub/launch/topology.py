"""The topology of a run: nodes, processes per node, and whether the strategy fits them. Pure functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_hub.config.recipe import Recipe
from lightning_hub.config.resolved import ClassConfig, ResolvedConfig, TrainerConfig
from lightning_hub.config.rules import check_processes
from lightning_hub.errors import ConfigError
from lightning_hub.launch.environment import ProcessInfo
from lightning_hub.launch.mesh import (
    MESH,
    STRATEGY,
    Mesh,
    check_mesh,
    check_replicas,
    nearest_mesh,
    read_mesh,
)

NODES, DEVICES = "trainer.num_nodes", "trainer.devices"

DISTRIBUTED = ("ddp", "fsdp", "FSDP", "DDPStrategy", "ModelParallel")
"""Strategies that have no effect in one process."""


@dataclass(frozen=True)
class Topology:
    """Nodes, and the processes that each of them runs."""

    nnodes: int = 1
    nproc_per_node: int = 1

    @property
    def world_size(self) -> int:
        """All processes of the run."""
        return self.nnodes * self.nproc_per_node


def resolve_topology(
    recipe: Recipe,
    config: ResolvedConfig,
    process: ProcessInfo | None,
    gpus: int,
    say: Callable[[str], None] = lambda note: None,
) -> tuple[Topology, ResolvedConfig]:
    """Return the shape of a run, and the config with it; refuse what does not fit together.

    Args:
        recipe: As given: what it leaves open may be anything.
        config: The same, checked, with its defaults.
        process: This process among those that a launcher has started, if one has.
        gpus: GPUs of this machine.
        say: Prints a note about devices that stay idle.

    Returns:
        The topology, and the config with its ``num_nodes``, ``devices`` and ``strategy``.

    Raises:
        ConfigError: Devices, nodes, strategy and the processes that were started do not fit together.
    """
    trainer = config.trainer
    asked = devices_asked(trainer, gpus)
    topology = Topology(trainer.num_nodes, asked or max(1, gpus if uses_gpus(trainer, gpus) else 1))
    if process is not None:
        topology = _topology_of_launcher(recipe, asked, topology, process)
    elif topology.nnodes > 1:
        raise ConfigError(
            f"{topology.nnodes} nodes are asked for, and nothing says which of them this is",
            where=recipe.where(NODES) or NODES,
            remedy="start the command on every node with torchrun --nnodes ... -m lightning_hub fit, or with srun",
        )
    if uses_gpus(trainer, gpus):
        _check_gpus(recipe, topology, gpus, say)
    devices = trainer.devices if isinstance(trainer.devices, list) else topology.nproc_per_node
    _check_strategy(recipe, trainer.strategy, topology.world_size)
    resolved = config.with_trainer(num_nodes=topology.nnodes, devices=devices)
    if topology.world_size == 1 and trainer.strategy.name in DISTRIBUTED:
        say(f"strategy {trainer.strategy.name} has no effect in one process: it is left out")
        resolved = resolved.with_trainer(strategy="auto")
    return topology, resolved


def single_process(config: ResolvedConfig) -> ResolvedConfig:
    """Return a config for one process, whatever it says: for verbs that read data or a checkpoint."""
    return config.with_trainer(num_nodes=1, devices=1, strategy="auto")


def uses_gpus(trainer: TrainerConfig, gpus: int) -> bool:
    """Return whether the trainer will run on GPUs of this machine."""
    return trainer.accelerator in ("gpu", "cuda") or (trainer.accelerator in (None, "auto") and gpus > 0)


def devices_asked(trainer: TrainerConfig, gpus: int) -> int | None:
    """Return how many devices of each node a recipe names; None if it leaves that open."""
    devices = trainer.devices
    if devices in ("auto", None):
        return None
    if devices in (-1, "-1"):
        return max(1, gpus)
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    return int(str(devices))


def _topology_of_launcher(recipe: Recipe, asked: int | None, topology: Topology, process: ProcessInfo) -> Topology:
    """Take the processes that a launcher has started, unless the recipe names other numbers."""
    found = Topology(process.nnodes, process.local_world_size)
    nodes_open = not isinstance(recipe.get(NODES), int)
    wanted = Topology(found.nnodes if nodes_open else topology.nnodes, asked or found.nproc_per_node)
    if wanted != found:
        raise ConfigError(
            f"the recipe asks for {wanted.nnodes} x {wanted.nproc_per_node} = {wanted.world_size} processes, "
            f"{process.launcher} started {found.nnodes} x {found.nproc_per_node} = {found.world_size}",
            where=recipe.where(DEVICES) or DEVICES,
            remedy="change trainer.num_nodes and trainer.devices, or what is started",
        )
    return found


def _check_gpus(recipe: Recipe, topology: Topology, gpus: int, say: Callable[[str], None]) -> None:
    if topology.nproc_per_node > gpus:
        raise ConfigError(
            f"{topology.nproc_per_node} devices are asked for, {gpus} GPUs are visible",
            where=recipe.where(DEVICES) or DEVICES,
            remedy="lower it, see CUDA_VISIBLE_DEVICES, or set trainer.accelerator: cpu",
        )
    if topology.nproc_per_node < gpus:
        say(f"{gpus - topology.nproc_per_node} of {gpus} GPUs stay idle: trainer.devices is {topology.nproc_per_node}")


def _check_strategy(recipe: Recipe, strategy: ClassConfig, world_size: int) -> None:
    """Refuse a strategy that this number of processes cannot form, and a method that cannot train in them."""
    try:
        mesh = mesh_of(strategy, world_size)
        check_processes(recipe, mesh.tp if mesh else 1, world_size)
    except ConfigError as error:
        error.where = recipe.where(error.where or STRATEGY) or error.where
        raise
    if world_size > 1 and strategy.name == "SingleDeviceStrategy":
        raise ConfigError(
            f"SingleDeviceStrategy runs in one process, {world_size} are asked for",
            where=recipe.where(STRATEGY) or STRATEGY,
            remedy="use ddp, fsdp or ModelParallel",
        )


def mesh_of(strategy: ClassConfig, world_size: int) -> Mesh | None:
    """Return the mesh of a strategy, or None for one that has no tensor-parallel axis.

    Raises:
        ConfigError: Its size is not the number of processes.
    """
    options = strategy.init_args
    if strategy.name == "model_parallel" or (strategy.name == "ModelParallel" and not options.get("mesh_shape")):
        example = f"{{class_path: ModelParallel, init_args: {{mesh_shape: {nearest_mesh(Mesh(1, 1), world_size, 1)}}}}}"
        raise ConfigError("model_parallel needs its mesh_shape", where=STRATEGY, remedy=f"write {example}")
    if strategy.name == "FSDP":
        check_replicas(int(str(options.get("replicas", 1))), world_size)
    if strategy.name != "ModelParallel":
        return None
    shape = options["mesh_shape"]
    if not isinstance(shape, list | tuple) or len(shape) != 2 or not all(isinstance(part, list) for part in shape):
        raise ConfigError(f"mesh_shape is {shape}", where=MESH, remedy="write sizes and names: [[4, 2], [fsdp, tp]]")
    sizes: Any = shape[0]
    names: Any = shape[1]
    mesh = read_mesh((sizes, names))
    check_mesh(mesh, world_size)
    return mesh
