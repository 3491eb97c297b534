"""Starts the processes of a proof, waits for them, and ends all of them in every case."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from lightning_hub.launch.environment import RANK_VARIABLES
from lightning_hub.launch.local import RankGroup, open_listener, start_ranks
from lightning_hub.parent import SUPERVISOR_VARIABLE
from lightning_hub.runs.folder import RunFolder

PYTHON = (sys.executable,)
"""The command that starts an interpreter."""

TIME_LIMIT = 100.0
"""Seconds after which processes that were started together are ended."""

GRACE = 2.0
"""Seconds that the other processes have to write their own error after the first one fails."""


@dataclass(frozen=True)
class Child:
    """A process to start.

    Attributes:
        name: Its name in an error.
        arguments: A module and its arguments.
        variables: Environment variables for this process only.
        expected: The exit code that means success.
    """

    name: str
    arguments: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    expected: int = 0


class ChildrenFailedError(RuntimeError):
    """Processes failed or did not end in time; the message says which and why."""


def run_children(children: Sequence[Child], folder: Path, limit: float = TIME_LIMIT) -> None:
    """Start processes together and wait for all of them.

    Args:
        children: The processes to start.
        folder: The folder of their output; their ``LIGHTNING_HUB_CACHE`` is a folder in it.
        limit: The time limit in seconds.

    Raises:
        ChildrenFailedError: A process ended with an unexpected exit code, or did not end in time.
    """
    with _interruptible(), _started(children, folder) as processes:
        end = time.monotonic() + limit
        while running := [process for process in processes if process.poll() is None]:
            if _failed(children, processes):
                end = min(end, time.monotonic() + GRACE)
            if time.monotonic() > end:
                break
            with suppress(subprocess.TimeoutExpired):
                running[0].wait(0.1)
        failed = _failed(children, processes)
        late = [child.name for child, process in zip(children, processes, strict=True) if process.poll() is None]
    if failed:
        raise ChildrenFailedError("; ".join(f"{child.name}: {_last_line(_output(child, folder))}" for child in failed))
    if late:
        raise ChildrenFailedError(f"{', '.join(late)} did not end within {limit:.0f} s")


def run_ranks(count: int, arguments: Sequence[str], folder: Path, limit: float = TIME_LIMIT) -> None:
    """Start the ranks of one process group as ``fit`` does, and wait for them.

    Args:
        count: The world size.
        arguments: A module and its arguments, the same for all ranks.
        folder: The folder of their output.
        limit: The time limit in seconds.

    Raises:
        ChildrenFailedError: A rank failed, or the ranks did not end in time.
    """
    end = time.monotonic() + limit

    def watch() -> None:
        if time.monotonic() > end:
            raise ChildrenFailedError(f"the ranks did not end within {limit:.0f} s")

    with open_listener() as listener:
        group = RankGroup(RunFolder(folder / "ranks"), 1, count, [*PYTHON, "-m", *arguments], listener)
        with _interruptible(), start_ranks(group) as ranks:
            ranks.wait(watch, GRACE)
    failed = [ending.rank for ending in ranks.endings.values() if ending.code != 0 and not ending.ended_here]
    if failed:
        words = [f"rank {rank}: {_last_line(group.folder.rank(1, rank).stderr)}" for rank in sorted(failed)]
        raise ChildrenFailedError("; ".join(words))


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM end this process as ctrl-c does, so that the processes that it has started are ended too."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _started(children: Sequence[Child], folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for child in children:
            processes.append(_start(child, folder))
        yield processes
    finally:
        for process in processes:
            with suppress(ProcessLookupError):  # all processes of its group have ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _start(child: Child, folder: Path) -> subprocess.Popen[bytes]:
    with _output(child, folder).open("wb") as output:
        return subprocess.Popen(
            [*PYTHON, "-m", *child.arguments],
            env={**_environment(folder), **child.variables, SUPERVISOR_VARIABLE: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "OMPI_", "PMI_", "ACCELERATE_", "MASTER_")
"""Prefixes of the environment variables of launchers."""


def _environment(folder: Path) -> dict[str, str]:
    """Return the environment without the variables of a launcher that may have started this process."""
    removed = {name for name in os.environ if name.startswith(LAUNCHERS) or name in RANK_VARIABLES}
    kept = {name: value for name, value in os.environ.items() if name not in removed}
    ours = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**kept, **ours, "LIGHTNING_HUB_CACHE": str(folder / "cache")}


def _failed(children: Sequence[Child], processes: Sequence[subprocess.Popen[bytes]]) -> list[Child]:
    pairs = zip(children, processes, strict=True)
    return [child for child, process in pairs if process.poll() not in (None, child.expected)]


def _output(child: Child, folder: Path) -> Path:
    return folder / f"{child.name.replace(' ', '-')}.log"


def _last_line(log: Path) -> str:
    """Return the last line that is not empty: the error itself."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it ended without a message")
