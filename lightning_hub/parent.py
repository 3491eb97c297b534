"""A rank does not outlive the process that started it: asked of the system before anything heavy is imported.

Importing torch, lightning and transformers takes seconds. A rank whose supervisor is killed within them is adopted by
another process: it would train to the end, and write over what a new attempt does.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import cache
from pathlib import Path

SUPERVISOR_VARIABLE = "LIGHTNING_HUB_SUPERVISOR_PID"
"""Tells a rank the pid of the process that started it."""

_PR_SET_PDEATHSIG = 1
_LAUNCHER_WORDS = ("torchrun", "torch.distributed", "torch/distributed", "accelerate", "python")
"""What the command line of a launcher holds, also where it is process 1 of a container."""
_ADOPTERS = {"systemd", "init", "tini", "dumb-init", "docker-init", "catatonit", "containerd-shim", "s6-svscan"}
"""Names of processes that adopt others and start no ranks themselves."""


@cache
def die_with_parent() -> None:
    """Have the system kill this process when the one that started it ends (Linux), and end if that has happened.

    Our own supervisor says in the environment who it is. torchrun does not: there the parent is taken as it is now,
    and is gone if a process that only adopts others stands in its place. Call it as early as possible; once is enough.
    """
    expected = os.environ.pop(SUPERVISOR_VARIABLE, "")  # processes that this one starts have another parent
    parent = os.getppid()
    if sys.platform.startswith("linux"):
        import ctypes  # 5 ms, which commands that start no ranks do not pay

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    is_gone = parent != int(expected) if expected.isdecimal() else _is_adopter(parent)
    if is_gone or os.getppid() != parent:  # before we asked, or while we did
        os.kill(os.getpid(), signal.SIGKILL)


def _is_adopter(pid: int) -> bool:
    """Say whether a process is one that takes in orphans, and no launcher."""
    process = Path("/proc") / str(pid)
    try:
        name = (process / "comm").read_text().strip()
        command = (process / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return pid == 1 and sys.platform.startswith("linux")
    return name in _ADOPTERS or (pid == 1 and not any(word in command for word in _LAUNCHER_WORDS))
