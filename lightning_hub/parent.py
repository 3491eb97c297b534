"""A rank ends when the process that started it ends.

The rank asks the system for this before it imports anything heavy, because the imports of torch, lightning and
transformers take seconds. If the supervisor is killed in that time, another process becomes the parent of the rank.
The rank would then train to the end and overwrite the files of a new attempt.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import cache
from pathlib import Path

SUPERVISOR_VARIABLE = "LIGHTNING_HUB_SUPERVISOR_PID"
"""The environment variable that gives a rank the pid of the process that started it."""

_PR_SET_PDEATHSIG = 1
_LAUNCHER_WORDS = ("torchrun", "torch.distributed", "torch/distributed", "accelerate", "python")
"""Words in the command line of a launcher. A launcher can be process 1 of a container."""
_ADOPTERS = {"systemd", "init", "tini", "dumb-init", "docker-init", "catatonit", "containerd-shim", "s6-svscan"}
"""Names of processes that become the parent of orphans and do not start ranks."""


@cache
def die_with_parent() -> None:
    """Let the system kill this process when its parent ends (Linux), and end now if the parent has already ended.

    Our supervisor gives its pid in the environment. torchrun does not. Under torchrun the current parent counts, and
    if that is a process that only adopts orphans, torchrun has ended. Call this as early as possible; only the first
    call has an effect.
    """
    expected = os.environ.pop(SUPERVISOR_VARIABLE, "")  # processes that this one starts have another parent
    parent = os.getppid()
    if sys.platform.startswith("linux"):
        import ctypes  # 5 ms, which commands that start no ranks do not pay

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    is_gone = parent != int(expected) if expected.isdecimal() else _is_adopter(parent)
    if is_gone or os.getppid() != parent:  # the parent ended before or during the call of prctl
        os.kill(os.getpid(), signal.SIGKILL)


def _is_adopter(pid: int) -> bool:
    """Return whether a process adopts orphans and is not a launcher."""
    process = Path("/proc") / str(pid)
    try:
        name = (process / "comm").read_text().strip()
        command = (process / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return pid == 1 and sys.platform.startswith("linux")
    return name in _ADOPTERS or (pid == 1 and not any(word in command for word in _LAUNCHER_WORDS))
