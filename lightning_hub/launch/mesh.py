"""Device meshes: how the ranks are divided between data and tensor parallelism. Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_hub.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

STRATEGY = "trainer.strategy"
"""Where a recipe names its strategy; errors point there."""

MESH = "trainer.strategy.init_args.mesh_shape"
"""Where a recipe writes its mesh."""

AXES = ("fsdp", "tp")


@dataclass(frozen=True)
class Mesh:
    """Sizes of the two axes of a mesh.

    Attributes:
        fsdp: Ranks that split the data, and hold a shard of each weight.
        tp: Ranks that work on the same packed rows, each with its shard of every layer.
    """

    fsdp: int
    tp: int

    def __str__(self) -> str:
        return f"[[{self.fsdp}, {self.tp}], [fsdp, tp]]"


def read_mesh(mesh_shape: tuple[list[int], list[str]]) -> Mesh:
    """Return a mesh as a recipe writes it: ``[[4, 2], [fsdp, tp]]``, in any order of the axes.

    Raises:
        ConfigError: A size or an axis is missing, unknown, doubled or below 1.
    """
    sizes, axes = mesh_shape
    if sorted(axes) != sorted(AXES):
        raise ConfigError(
            f"mesh_shape names the axes {list(axes)}",
            where=MESH,
            remedy="name fsdp and tp, once each, with their sizes",
        )
    if len(sizes) != len(axes) or any(size < 1 for size in sizes):
        raise ConfigError(
            f"mesh_shape has the sizes {list(sizes)}", where=MESH, remedy="give each axis one size of 1 or more"
        )
    named = dict(zip(axes, sizes, strict=True))
    return Mesh(fsdp=named["fsdp"], tp=named["tp"])


def check_mesh(mesh: Mesh, world_size: int) -> None:
    """Refuse a mesh whose size is not the world size; the error names the nearest meshes that fit."""
    found = mesh.fsdp * mesh.tp
    if found == world_size:
        return
    idle = f", which leaves {world_size - found} idle" if found < world_size else ""
    raise ConfigError(
        f"mesh_shape {mesh} takes {mesh.fsdp} x {mesh.tp} = {found} processes, the run has {world_size}{idle}",
        where=MESH,
        remedy=f"use {nearest_mesh(mesh, world_size)}",
    )


def nearest_mesh(mesh: Mesh, world_size: int, count: int = 2) -> str:
    """Return the meshes of ``world_size`` ranks that differ least from ``mesh``, by the ratio of their sizes."""
    fitting = [Mesh(world_size // tp, tp) for tp in range(1, world_size + 1) if world_size % tp == 0]

    def distance(other: Mesh) -> float:
        return abs(math.log(other.tp / mesh.tp)) + abs(math.log(other.fsdp / mesh.fsdp))

    return " or ".join(str(other) for other in sorted(fitting, key=distance)[:count])


def check_replicas(replicas: int, world_size: int) -> None:
    """Refuse a number of replicas that does not divide the processes of the run."""
    if world_size % replicas:
        sizes = ", ".join(str(size) for size in range(1, world_size + 1) if world_size % size == 0)
        raise ConfigError(
            f"{world_size} processes do not form {replicas} equal replicas",
            where="trainer.strategy.init_args.replicas",
            remedy=f"use one of {sizes}",
        )


def check_divisible(config: PretrainedConfig, tp: int) -> None:
    """Refuse a tensor-parallel size that does not divide the sizes that it splits; the error names the size.

    Args:
        config: The model's configuration.
        tp: Ranks that split each layer.
    """
    text = config.get_text_config()
    sizes = {name: getattr(text, name, None) for name in SPLIT}
    for name, size in sizes.items():
        if isinstance(size, int) and size % tp:
            common = math.gcd(*(size for size in sizes.values() if isinstance(size, int)))
            fitting = ", ".join(str(size) for size in range(1, common + 1) if common % size == 0)
            raise ConfigError(
                f"tp {tp} does not divide the model's {name} {size}", where=MESH, remedy=f"use a tp of {fitting}"
            )


SPLIT = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""What tensor parallelism splits, as configurations name it."""
