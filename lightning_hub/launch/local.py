"""The processes of one node: started with the environment that torchrun would give them, watched, and ended together.

A rank's output goes straight into its log files, through descriptors that it inherits: no pipe can fill up, and what
a crash writes last is there. Ranks run in a session of their own, so that a key pressed in the terminal reaches the
supervisor alone, and they die with it (`lightning_hub.parent`).
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
"""Seconds in which the other ranks may say what they have seen, after one has failed."""

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that ask for something, which ranks hear of."""

_PERIOD = 0.05
_LOOPBACK = Path("/sys/class/net/lo")


@dataclass(frozen=True)
class RankGroup:
    """What the ranks of one attempt on this machine have in common.

    Attributes:
        folder: The run.
        attempt: Number of the attempt.
        world_size: How many ranks there are, all of them here.
        argv: The command of every rank.
        listener: A socket of the loopback address on which rank 0 will answer; opened before any rank starts, so
            that no other program can take its port.
    """

    folder: RunFolder
    attempt: int
    world_size: int
    argv: Sequence[str]
    listener: socket.socket

    @property
    def port(self) -> int:
        """The port on which the ranks meet."""
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
        ended_here: Whether the supervisor ended it, because another had failed before.
    """

    rank: int
    code: int
    at: float
    ended_here: bool = False


class RunningRanks:
    """The running ranks of a group.

    Use as ``with start_ranks(group) as ranks``: when the block is left, for whatever reason, none of them runs.
    """

    def __init__(self, processes: dict[int, subprocess.Popen[bytes]]) -> None:
        self.processes = processes
        self.endings: dict[int, RankExit] = {}

    @property
    def running(self) -> list[int]:
        """Ranks that have not ended."""
        return [rank for rank in self.processes if rank not in self.endings]

    def poll(self) -> None:
        """Note which ranks have ended since the last look.

        They stay unreaped until `end`, so that the number of each still means it and the group that it leads.
        """
        for rank in self.running:
            result = os.waitid(os.P_PID, self.processes[rank].pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if result is not None:
                code = result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
                self.endings[rank] = RankExit(rank, code, time.monotonic())

    def signal(self, number: int) -> None:
        """Send a signal to every rank that runs: never to one alone."""
        for rank in self.running:
            os.kill(self.processes[rank].pid, number)

    def end(self) -> None:
        """Kill what still runs, with everything that the ranks have started."""
        self.poll()
        for rank, process in self.processes.items():
            if process.returncode is None:
                _kill_group(process.pid)
                code = process.wait()
                self.endings.setdefault(rank, RankExit(rank, code, time.monotonic(), ended_here=True))

    def wait(self, meanwhile: Callable[[], None], grace: float = GRACE_SECONDS) -> None:
        """Wait until all have ended; once one fails, the others have ``grace`` seconds.

        Args:
            meanwhile: Called at every look, many times a second.
            grace: Seconds.
        """
        while self.running:
            self.poll()
            meanwhile()
            failed = [ending.at for ending in self.endings.values() if ending.code != 0]
            if failed and time.monotonic() - min(failed) > grace:
                break
            if self.running:
                time.sleep(_PERIOD)
        self.end()
        meanwhile()


@contextmanager
def start_ranks(group: RankGroup) -> Iterator[RunningRanks]:
    """Start every rank of a group, its output in its log files, and leave none behind."""
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
    """Hold signals back while it lasts. Ranks inherit that, and let them in when they are ready to listen."""
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
    """Return a listening socket of the loopback address, on a port that nobody else has."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    return listener
