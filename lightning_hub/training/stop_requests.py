"""Stop and checkpoint requests (signals, control files); all ranks agree once per step."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType

from lightning_hub.callbacks.checkpoint_saver import SaveRequest
from lightning_hub.launch.local import FORWARDED_SIGNALS
from lightning_hub.parallel.collectives import all_reduce_max
from lightning_hub.runs.rank_writer import RankWriter
from lightning_hub.runs.records import State


class HardStop(BaseException):
    """A second interrupt: stop at once. It is not a KeyboardInterrupt, for which Lightning has its own exit code."""


class RequestKind(IntEnum):
    """What is requested; if ranks get different requests, the largest counts."""

    NOTHING = 0
    CHECKPOINT = 1
    STOP = 2
    PREEMPT = 3
    REQUEUE = 4


class StopRequests:
    """Signals of this process and, on rank 0, control files of the run folder.

    A signal handler only records the request. All ranks act on it at the next step boundary, after they have agreed.
    So a signal to one rank stops all of them, and none waits for another.

    Args:
        hard: Whether a second SIGINT stops this process at once; under a launcher, the launcher does that.
    """

    def __init__(self, *, hard: bool) -> None:
        self.hard = hard
        self.accepted = RequestKind.NOTHING
        self._heard = RequestKind.NOTHING
        self._interrupts = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record signals during the block."""
        before = {number: signal.signal(number, self._note) for number in FORWARDED_SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED_SIGNALS)  # blocked since the start of the rank
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self.hard and (self._interrupts > 1 or self._heard > RequestKind.NOTHING):
                raise HardStop("stopped at once; the newest checkpoint is untouched")
        meant = {signal.SIGINT: RequestKind.STOP, signal.SIGUSR1: RequestKind.REQUEUE}.get(
            signal.Signals(number), RequestKind.PREEMPT
        )
        self._heard = max(self._heard, meant)

    def poll(self, rank: RankWriter, stopping: Callable[[], None]) -> SaveRequest:
        """Return what all ranks have agreed to do now; every rank must call this after the same step.

        Args:
            rank: The files of this rank.
            stopping: Called when they have agreed to stop.
        """
        asked = self._heard
        if rank.rank == 0:
            asked = max(asked, _from_files(rank))
        self.accepted = RequestKind(all_reduce_max(asked))
        if self.accepted >= RequestKind.STOP:
            stopping()
            return "stop"
        return "checkpoint" if self.accepted else None

    @property
    def ends_as(self) -> State:
        """The state of the stopped run: preempted if another job needed its resources, else stopped."""
        return "preempted" if self.accepted >= RequestKind.PREEMPT else "stopped"


def _from_files(rank: RankWriter) -> RequestKind:
    if rank.stop_requested():
        return RequestKind.STOP
    return RequestKind.CHECKPOINT if rank.checkpoint_requested() else RequestKind.NOTHING


def requeue(environ: Mapping[str, str]) -> str | None:
    """Ask SLURM to requeue this job; return the result as a message, or None outside of SLURM."""
    job = environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    if "SLURM_ARRAY_JOB_ID" in environ:
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ.get('SLURM_ARRAY_TASK_ID', '0')}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"SLURM job {job} could not be requeued: {error}"
    if done.returncode != 0:
        return f"SLURM job {job} could not be requeued: {done.stderr.strip() or f'exit code {done.returncode}'}"
    return f"SLURM job {job} is requeued"
