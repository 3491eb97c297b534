"""The ranks of one node: started with the environment variables of torchrun, watched, and ended together.

A rank writes directly to its log files, through descriptors that it inherits: no pipe can fill up, and the last lines
before a crash are in the log. Ranks run in a session of their own, so a key pressed in the terminal reaches the
supervisor only. They end when the supervisor ends (`lightning_hub.parent`).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lightning_hub.launch.environment import ATTEMPT_VARIABLE, LISTENER_VARIABLE, RANK_VARIABLES, RUN_VARIABLE
from lightning_hub.parent import SUPERVISOR_VARIABLE
from lightning_hub.runs.files import make_private_folder, open_append
from lightning_hub.runs.folder import RankFolder, RunFolder

GRACE_SECONDS = 5.0
"""Seconds that the other ranks have to write their errors after one rank has failed."""

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that the supervisor forwards to every rank."""

_PERIOD = 0.05
_LOOPBACK = Path("/sys/class/net/lo")


@dataclass(frozen=True)
class RankGroup:
    """What all ranks of one attempt on this machine share.

    Attributes:
        folder: The run.
        attempt: Number of the attempt.
        world_size: How many ranks there are, all of them here.
        argv: The command of every rank.
        listener: The listening socket of rank 0 on the loopback address; it is opened before any rank starts, so
            that no other program can take its port.
    """

    folder: RunFolder
    attempt: int
    world_size: int
    argv: Sequence[str]
    listener: socket.socket

    @property
    def port(self) -> int:
        """The port of the rendezvous."""
        return int(self.listener.getsockname()[1])

    def environment(self, rank: int) -> dict[str, str]:
        """Return the variables of a rank that differ from those of this process."""
        loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if _LOOPBACK.exists() else {}
        return {
            **loopback,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
            "TORCHELASTIC_RUN_ID": self.folder.id,
            "TORCHELASTIC_MAX_RESTARTS": "0",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(self._threads()),
            RUN_VARIABLE: str(self.folder.path.resolve()),
            ATTEMPT_VARIABLE: str(self.attempt),
            SUPERVISOR_VARIABLE: str(os.getpid()),
            **({LISTENER_VARIABLE: str(self.listener.fileno())} if rank == 0 else {}),
        }

    def _threads(self) -> int:
        return max(1, len(os.sched_getaffinity(0)) // self.world_size)


@dataclass(frozen=True)
class RankExit:
    """How a rank ended.

    Attributes:
        rank: Its number.
        code: Its exit code; below 0 the number of the signal that killed it.
        at: When that was seen (monotonic, seconds).
        ended_here: Whether the supervisor ended it, because another rank had failed.
    """

    rank: int
    code: int
    at: float
    ended_here: bool = False


class RunningRanks:
    """The running ranks of a group.

    Use as ``with start_ranks(group) as ranks``: after the block none of them runs, whatever the reason.
    """

    def __init__(self, processes: dict[int, subprocess.Popen[bytes]]) -> None:
        self.processes = processes
        self.endings: dict[int, RankExit] = {}

    @property
    def running(self) -> list[int]:
        """Ranks that have not ended."""
        return [rank for rank in self.processes if rank not in self.endings]

    def poll(self) -> None:
        """Find the ranks that have ended since the last call.

        They are not reaped until `end`, so that each pid still names the rank and its process group.
        """
        for rank in self.running:
            result = os.waitid(os.P_PID, self.processes[rank].pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if result is not None:
                code = result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
                self.endings[rank] = RankExit(rank, code, time.monotonic())

    def signal(self, number: int) -> None:
        """Send a signal to every running rank, never to one rank only."""
        for rank in self.running:
            os.kill(self.processes[rank].pid, number)

    def end(self) -> None:
        """Kill the ranks that still run, and the processes that they have started."""
        self.poll()
        for rank, process in self.processes.items():
            if process.returncode is None:
                _kill_group(process.pid)
                code = process.wait()
                self.endings.setdefault(rank, RankExit(rank, code, time.monotonic(), ended_here=True))

    def wait(self, on_poll: Callable[[], None], grace: float = GRACE_SECONDS) -> None:
        """Wait until all ranks have ended; after one has failed, the others have ``grace`` seconds.

        Args:
            on_poll: Called at every poll, many times a second.
            grace: Seconds.
        """
        while self.running:
            self.poll()
            on_poll()
            failed = [ending.at for ending in self.endings.values() if ending.code != 0]
            if failed and time.monotonic() - min(failed) > grace:
                break
            if self.running:
                time.sleep(_PERIOD)
        self.end()
        on_poll()


@contextmanager
def start_ranks(group: RankGroup) -> Iterator[RunningRanks]:
    """Start every rank of a group, with its output in its log files; none is left after the block."""
    ranks = RunningRanks({})
    try:
        with _signals_blocked():
            for rank in range(group.world_size):
                ranks.processes[rank] = _start(group, rank)
        yield ranks
    finally:
        ranks.end()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block signals during the block. Ranks inherit the mask, and unblock signals when their handlers are ready."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(group: RankGroup, rank: int) -> subprocess.Popen[bytes]:
    files: RankFolder = group.folder.rank(group.attempt, rank)
    make_private_folder(files.path)
    out, err = open_append(files.stdout), open_append(files.stderr)
    try:
        return subprocess.Popen(
            group.argv,
            env={**_without_rank_variables(os.environ), **group.environment(rank)},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
            pass_fds=[group.listener.fileno()] if rank == 0 else [],
        )
    finally:
        os.close(out)
        os.close(err)


def _without_rank_variables(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in RANK_VARIABLES}


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)  # a rank leads the group of its session
    except (ProcessLookupError, PermissionError):
        return


def open_listener() -> socket.socket:
    """Return a listening socket on the loopback address, on a free port."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    return listener
