"""Processes of a proof: started together, watched, and none left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

PYTHON = (sys.executable,)
"""How an interpreter is started."""

TIME_LIMIT = 100.0
"""Seconds after which processes that were started together are ended."""

GRACE = 2.0
"""Seconds that the others have to tell their own error after the first that fails."""


@dataclass(frozen=True)
class Child:
    """A process to start.

    Attributes:
        name: What it is called in an error.
        arguments: A module and what it is given.
        variables: Its own environment variables.
        expected: The exit code of its success.
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
        children: What to start.
        folder: Where their output is kept, and what they find in ``LIGHTNING_HUB_CACHE``.
        limit: Seconds that they have.

    Raises:
        ChildrenFailedError: One ended with another exit code than expected, or not in time.
    """
    with _started(children, folder) as processes:
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
        raise ChildrenFailedError("; ".join(f"{child.name}: {_last_words(child, folder)}" for child in failed))
    if late:
        raise ChildrenFailedError(f"{', '.join(late)} did not end within {limit:.0f} s")


def ranks(count: int, arguments: tuple[str, ...]) -> list[Child]:
    """Return the ranks of one world on this machine, as torchrun would start them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "proof"}
    return [
        Child(f"rank {rank}", arguments, {"RANK": str(rank), "LOCAL_RANK": str(rank), **world, **meeting})
        for rank in range(count)
    ]


def end_with_parent() -> None:
    """End this process when the one that started it is gone, however that happened."""

    def wait() -> None:
        while os.read(0, 1):  # no lock is held, so that this thread stands in nobody's way at the end
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _started(children: Sequence[Child], folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for child in children:
            processes.append(_start(child, folder))
        yield processes
    finally:
        for process in processes:
            with suppress(ProcessLookupError):  # all of its group have ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert process.stdin is not None, "it was opened as a pipe"
            process.stdin.close()
        signal.signal(signal.SIGTERM, before)


def _start(child: Child, folder: Path) -> subprocess.Popen[bytes]:
    with _output(child, folder).open("wb") as output:
        return subprocess.Popen(
            [*PYTHON, "-m", *child.arguments],
            env={**_environment(folder), **child.variables},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "OMPI_", "PMI_", "ACCELERATE_", "GROUP_", "ROLE_")
WORLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "NNODES", "MASTER_ADDR", "MASTER_PORT")


def _environment(folder: Path) -> dict[str, str]:
    """Return the environment without what a launcher around this process has said."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS) and name not in WORLD}
    ours = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**kept, **ours, "LIGHTNING_HUB_CACHE": str(folder / "cache")}


def _failed(children: Sequence[Child], processes: Sequence[subprocess.Popen[bytes]]) -> list[Child]:
    pairs = zip(children, processes, strict=True)
    return [child for child, process in pairs if process.poll() not in (None, child.expected)]


def _output(child: Child, folder: Path) -> Path:
    return folder / f"{child.name.replace(' ', '-')}.log"


def _last_words(child: Child, folder: Path) -> str:
    """Return the last line that says something: the error itself."""
    lines = _output(child, folder).read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it ended without a word")
