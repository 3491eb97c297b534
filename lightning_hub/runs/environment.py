"""Describes a node: versions, addresses, and the environment variables of an allow list."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata

import psutil

from lightning_hub.runs.files import Json

_PACKAGES = (
    "lightning-hub",
    "torch",
    "lightning",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "pyarrow",
    "numpy",
    "jsonargparse",
    "peft",
    "flash-attn",
    "triton",
)

ALLOWED_VARIABLES = frozenset(
    {
        "ACCELERATE_USE_CPU",
        "CUDA_VISIBLE_DEVICES",
        "GROUP_RANK",
        "HF_HOME",
        "HF_HUB_OFFLINE",
        "LIGHTNING_HUB_RUNS",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "NNODES",
        "NODE_RANK",
        "NPROC_PER_NODE",
        "OMP_NUM_THREADS",
        "PYTHONHASHSEED",
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
        "RANK",
        "SLURM_JOB_ID",
        "SLURM_NNODES",
        "SLURM_NODEID",
        "SLURM_NTASKS",
        "SLURM_PROCID",
        "TOKENIZERS_PARALLELISM",
        "WORLD_SIZE",
    }
)
_ALLOWED_PREFIXES = ("NCCL_", "GLOO_")


def describe_environment(devices: Sequence[str] = ()) -> dict[str, Json]:
    """Return the content of ``env.json``.

    Args:
        devices: Names of the accelerators, from a caller that has imported torch.
    """
    listed: list[Json] = list(devices)
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": _versions(),
        "variables": {name: os.environ[name] for name in sorted(os.environ) if _is_allowed(name)},
        "interfaces": _interfaces(),
        "devices": listed,
        "cpus": len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
    }


def _is_allowed(name: str) -> bool:
    return name in ALLOWED_VARIABLES or name.startswith(_ALLOWED_PREFIXES)


def _versions() -> dict[str, Json]:
    found: dict[str, Json] = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _interfaces() -> dict[str, Json]:
    wanted = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [address.address for address in addresses if address.family in wanted]
        for name, addresses in psutil.net_if_addrs().items()
    }


def git_state() -> dict[str, Json] | None:
    """Return the commit of the working folder and whether files differ from it; None outside a repository."""
    sha = _git("rev-parse", "HEAD")
    if sha is None:
        return None
    return {"sha": sha, "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):  # git is not installed, or the file system is too slow
        return None
    return done.stdout.strip() if done.returncode == 0 else None
