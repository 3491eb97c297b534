"""How many processes a recipe asks for: this command is one."""

from __future__ import annotations

import os
from typing import Any

from lightning_hub.config.recipe import Recipe
from lightning_hub.errors import ConfigError


def require_one_process(recipe: Recipe, trainer: dict[str, Any]) -> None:
    """Refuse what needs several processes, and let ``devices: auto`` mean one device.

    Args:
        recipe: For the place of a fault.
        trainer: The trainer section with its defaults; ``devices`` and ``strategy`` are settled in it.

    Raises:
        ConfigError: More than one process is asked for, or has been started.
    """
    nodes, devices, strategy = trainer["num_nodes"], trainer["devices"], trainer["strategy"]
    several = nodes > 1 or (isinstance(devices, int) and devices > 1) or devices == -1
    several = several or (isinstance(devices, list) and len(devices) > 1)
    started = int(os.environ.get("WORLD_SIZE", "1") or 1)
    if several or started > 1:
        key = "trainer.num_nodes" if nodes > 1 else "trainer.devices"
        asked = f"{started} processes were started" if started > 1 else f"{nodes} x {devices} processes are asked for"
        where = recipe.where(key) or key
        raise ConfigError(f"{asked}, this version trains in one", where=where, remedy="use 1 node and 1 device")
    if strategy not in ("auto", None):
        where = recipe.where("trainer.strategy") or "trainer.strategy"
        raise ConfigError(f"strategy {strategy!r} is for several processes", where=where, remedy="leave it out")
    if devices == "auto":
        trainer["devices"] = 1
