"""Identifies a process by more than its pid, because a later process can have the same pid."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_START_FIELD = 19  # of /proc/<pid>/stat, counted after the bracketed name: clock ticks since boot


@cache
def boot_id() -> str:
    """Return an id that is different after each boot of this machine."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return f"boot-{psutil.boot_time():.0f}"


@dataclass(frozen=True)
class ProcessIdentity:
    """The identity of one process on any machine.

    Attributes:
        pid: Its process id.
        start: When it started: clock ticks since boot on systems with ``/proc``, else seconds since 1970.
        boot: The boot id of its machine.
        host: The name of its machine.
    """

    pid: int
    start: float
    boot: str
    host: str

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        """Return the identity of a running process of this machine, or None."""
        start = _start_of(pid)
        return None if start is None else cls(pid, start, boot_id(), socket.gethostname())

    @classmethod
    def own(cls) -> ProcessIdentity:
        """Return the identity of this process."""
        found = cls.of(os.getpid())
        assert found is not None, "this process is running"
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> ProcessIdentity | None:
        """Read an identity from ``pid``, ``pid_start``, ``boot_id`` and ``host``; None when incomplete."""
        pid, start, boot, host = (data.get(key) for key in ("pid", "pid_start", "boot_id", "host"))
        if not isinstance(pid, int) or not isinstance(start, int | float) or not isinstance(boot, str):
            return None
        return cls(pid, start, boot, host if isinstance(host, str) else "")

    def to_json(self) -> dict[str, int | float | str]:
        """Return the form that is written to the files of a run."""
        return {"pid": self.pid, "pid_start": self.start, "boot_id": self.boot, "host": self.host}

    def is_alive(self) -> bool | None:
        """Return whether exactly this process still runs; None for a process of another machine."""
        if self.boot != boot_id():
            return None if self.host != socket.gethostname() else False
        if self.host and self.host != socket.gethostname():
            return None  # a container of this machine, which has its own pids
        return _start_of(self.pid) == self.start


def _start_of(pid: int) -> float | None:
    """Return when a running process started, or None if there is no such process (a zombie has ended)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None if Path("/proc/self/stat").exists() else _start_elsewhere(pid)
    return None if fields[0] in "ZXx" else float(fields[_START_FIELD])


def _start_elsewhere(pid: int) -> float | None:
    """Return the same from psutil, on systems without ``/proc``."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None
