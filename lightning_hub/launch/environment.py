"""Rank and world size of this process, as its launcher wrote them to the environment. A pure function."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_hub.errors import ConfigError

RUN_VARIABLE = "LIGHTNING_HUB_RUN_DIR"
ATTEMPT_VARIABLE = "LIGHTNING_HUB_ATTEMPT"
LISTENER_VARIABLE = "LIGHTNING_HUB_LISTENER"

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "NODE_RANK")
"""The variables that give a process its rank; a launcher sets all of them for every rank."""

_REMEDY = "start it with torchrun, or without these variables: then the command starts its own processes"


@dataclass(frozen=True)
class ProcessInfo:
    """Rank and world size of one process, and the launcher that started it.

    Attributes:
        rank: Its number, from 0.
        world_size: How many there are.
        local_rank: Its number on its node.
        local_world_size: How many run on its node.
        launcher: Who started it: ``fit`` (this package), ``torchrun``, ``slurm`` or ``env``; ``none`` if it is alone.
        run_dir: The run folder, where this package started it.
        attempt: The attempt that it belongs to, likewise.
        listener: Descriptor of the socket on which rank 0 answers, likewise.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "none"
    run_dir: Path | None = None
    attempt: int = 0
    listener: int | None = None

    @property
    def node_rank(self) -> int:
        """The number of its node; every node runs as many processes."""
        return self.rank // self.local_world_size

    @property
    def nnodes(self) -> int:
        """How many nodes there are."""
        return self.world_size // self.local_world_size

    @property
    def is_single(self) -> bool:
        """Whether the run has no other process."""
        return self.world_size == 1

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size}, node {self.node_rank} of {self.nnodes}"


def detect_process(environ: Mapping[str, str]) -> ProcessInfo | None:
    """Return the rank that a launcher has given this process, or None if no launcher started several processes.

    Raises:
        ConfigError: The variables say that there are other processes, but not which one this is.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        return _torchrun(environ)
    if _is_slurm_step(environ):
        return _slurm(environ)
    if int(_number(environ, "WORLD_SIZE", 1)) > 1 or _number(environ, "RANK", 0) > 0:
        return _from_variables(environ)
    return None  # RANK=0 or LOCAL_RANK=0 alone says nothing about other processes


def _torchrun(environ: Mapping[str, str]) -> ProcessInfo:
    process = _per_process(environ, "torchrun", _number(environ, "LOCAL_WORLD_SIZE"))
    if RUN_VARIABLE not in environ:
        return process
    return replace(
        process,
        launcher="fit",
        run_dir=Path(environ[RUN_VARIABLE]),
        attempt=_number(environ, ATTEMPT_VARIABLE),
        listener=_number(environ, LISTENER_VARIABLE) if LISTENER_VARIABLE in environ else None,
    )


def _from_variables(environ: Mapping[str, str]) -> ProcessInfo:
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not environ.get(name)]
    if missing:
        given = ", ".join(f"{name}={environ[name]}" for name in RANK_VARIABLES if environ.get(name))
        raise ConfigError(
            f"{given} is set, {' and '.join(missing)} is not: it is unclear which process of how many this is",
            where="environment",
            remedy=_REMEDY,
        )
    return _per_process(environ, "env", _number(environ, "LOCAL_WORLD_SIZE", _number(environ, "WORLD_SIZE")))


def _per_process(environ: Mapping[str, str], launcher: str, local_world_size: int) -> ProcessInfo:
    process = ProcessInfo(
        _number(environ, "RANK"),
        _number(environ, "WORLD_SIZE"),
        _number(environ, "LOCAL_RANK"),
        local_world_size,
        launcher,
    )
    return _consistent(process)


def _is_slurm_step(environ: Mapping[str, str]) -> bool:
    """Return whether srun started this process as one of several tasks; a shell inside an allocation is not one."""
    interactive = environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return not interactive and "SLURM_STEP_ID" in environ and _number(environ, "SLURM_NTASKS", 1) > 1


def _slurm(environ: Mapping[str, str]) -> ProcessInfo:
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or ""
    per_node = re.fullmatch(r"(\d+)(\(x\d+\))?", tasks)
    if per_node is None:
        raise ConfigError(
            f"SLURM runs {tasks or 'an unknown number of'} tasks per node, nodes must run equally many",
            where="environment",
            remedy="give srun --ntasks-per-node",
        )
    rank, size = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_NTASKS")
    return _consistent(ProcessInfo(rank, size, _number(environ, "SLURM_LOCALID"), int(per_node[1]), "slurm"))


def _consistent(process: ProcessInfo) -> ProcessInfo:
    fits = (
        0 <= process.rank < process.world_size
        and 0 <= process.local_rank < process.local_world_size
        and process.world_size % process.local_world_size == 0
    )
    if fits:
        return process
    raise ConfigError(
        f"rank {process.rank} of {process.world_size} cannot be local rank {process.local_rank} "
        f"of {process.local_world_size}",
        where="environment",
        remedy=_REMEDY,
    )


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name) or ""
    if not text and default is not None:
        return default
    if not text.isdecimal():
        raise ConfigError(f"{name} is {text!r}, no number", where="environment", remedy=_REMEDY)
    return int(text)
