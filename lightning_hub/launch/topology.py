"""How many processes a recipe means, and whether its strategy can be made of them. Pure, before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_hub.config.recipe import Recipe
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
    trainer: dict[str, Any],
    process: ProcessInfo | None,
    gpus: int,
    say: Callable[[str], None] = lambda note: None,
) -> Topology:
    """Return the shape of a run, write it into the trainer section, and refuse what cannot be.

    Args:
        recipe: As given: what it leaves open may be anything.
        trainer: The trainer section with its defaults; ``num_nodes``, ``devices`` and ``strategy`` are settled in it.
        process: Who this process is, if a launcher has started it.
        gpus: Accelerators of this machine.
        say: Told what is left unused.

    Raises:
        ConfigError: Devices, nodes, strategy and the processes that were started do not fit together.
    """
    asked = devices_asked(trainer, gpus)
    topology = Topology(trainer["num_nodes"] or 1, asked or max(1, gpus if uses_gpus(trainer, gpus) else 1))
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
    trainer["num_nodes"] = topology.nnodes
    if not isinstance(trainer["devices"], list):
        trainer["devices"] = topology.nproc_per_node
    _resolve_strategy(recipe, trainer, topology.world_size, say)
    return topology


def single_process_topology(trainer: dict[str, Any]) -> Topology:
    """Make a recipe one of a single process, whatever it says: for commands that measure or answer."""
    trainer["num_nodes"], trainer["devices"], trainer["strategy"] = 1, 1, "auto"
    return Topology()


def uses_gpus(trainer: dict[str, Any], gpus: int) -> bool:
    """Say whether the trainer will run on GPUs of this machine."""
    return trainer["accelerator"] in ("gpu", "cuda") or (trainer["accelerator"] in (None, "auto") and gpus > 0)


def devices_asked(trainer: dict[str, Any], gpus: int) -> int | None:
    """Return how many devices of each node a recipe names; None if it leaves that open."""
    devices = trainer["devices"]
    if devices in ("auto", None):
        return None
    if devices in (-1, "-1"):
        return max(1, gpus)
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    return int(devices)


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


def _resolve_strategy(recipe: Recipe, trainer: dict[str, Any], world_size: int, say: Callable[[str], None]) -> None:
    """Check the strategy against the number of processes; in one process there is nothing to share out."""
    try:
        mesh = mesh_of(trainer["strategy"], world_size)
        check_processes(recipe, mesh.tp if mesh else 1, world_size)
    except ConfigError as error:
        error.where = recipe.where(error.where or STRATEGY) or error.where
        raise
    if world_size == 1 and trainer["strategy"] not in (None, "auto"):
        if _class_name(trainer["strategy"]) in ("ddp", "fsdp", "FSDP", "DDPStrategy", "ModelParallel"):
            say(f"strategy {_class_name(trainer['strategy'])} has nothing to share out in one process: it is left out")
            trainer["strategy"] = "auto"
    elif world_size > 1 and _class_name(trainer["strategy"]) == "SingleDeviceStrategy":
        raise ConfigError(
            f"SingleDeviceStrategy runs in one process, {world_size} are asked for",
            where=recipe.where(STRATEGY) or STRATEGY,
            remedy="use ddp, fsdp or ModelParallel",
        )


def mesh_of(strategy: str | dict[str, Any] | None, world_size: int) -> Mesh | None:
    """Return the mesh of a strategy as a recipe gives it, or None for one that has no tensor-parallel axis.

    Raises:
        ConfigError: It is not made of exactly the processes of the run.
    """
    name, options = _class_name(strategy), strategy.get("init_args", {}) if isinstance(strategy, dict) else {}
    if name == "model_parallel" or (name == "ModelParallel" and not options.get("mesh_shape")):
        example = f"{{class_path: ModelParallel, init_args: {{mesh_shape: {nearest_mesh(Mesh(1, 1), world_size, 1)}}}}}"
        raise ConfigError("model_parallel needs its mesh_shape", where=STRATEGY, remedy=f"write {example}")
    if name == "FSDP":
        check_replicas(options.get("replicas", 1), world_size)
    if name != "ModelParallel":
        return None
    shape = options["mesh_shape"]
    if not isinstance(shape, list | tuple) or len(shape) != 2 or not all(isinstance(part, list) for part in shape):
        raise ConfigError(f"mesh_shape is {shape}", where=MESH, remedy="write sizes and names: [[4, 2], [fsdp, tp]]")
    mesh = read_mesh((shape[0], shape[1]))
    check_mesh(mesh, world_size)
    return mesh


def _class_name(strategy: str | dict[str, Any] | None) -> str:
    name = strategy.get("class_path", "") if isinstance(strategy, dict) else strategy or "auto"
    return str(name).rpartition(".")[2]
