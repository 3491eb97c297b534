"""What somebody asks of a running attempt, through files or signals, agreed on by all ranks in the normal loop."""

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
    """A second interrupt: stop at once. No KeyboardInterrupt, which Lightning turns into an exit code of its own."""


class RequestKind(IntEnum):
    """What is asked for; where ranks are asked for different things, the largest counts."""

    NOTHING = 0
    CHECKPOINT = 1
    STOP = 2
    PREEMPT = 3
    REQUEUE = 4


class StopRequests:
    """Signals of this process and, on rank 0, wishes in the run folder.

    A signal handler only notes: what it asks for happens at the next step boundary, when every rank has heard of it.
    So a signal to one rank alone stops all of them, and none waits for another.

    Args:
        hard: Whether a second SIGINT stops this process at once; a launcher has its own way to do that.
    """

    def __init__(self, *, hard: bool) -> None:
        self.hard = hard
        self.accepted = RequestKind.NOTHING
        self._heard = RequestKind.NOTHING
        self._interrupts = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals while it lasts."""
        before = {number: signal.signal(number, self._note) for number in FORWARDED_SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED_SIGNALS)  # held back since the start of a rank
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
        """Return what all ranks have agreed to do now; every rank must ask after the same step.

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
        """The state of a run that was stopped: whoever asked it to make room will want it back."""
        return "preempted" if self.accepted >= RequestKind.PREEMPT else "stopped"


def _from_files(rank: RankWriter) -> RequestKind:
    if rank.stop_requested():
        return RequestKind.STOP
    return RequestKind.CHECKPOINT if rank.checkpoint_requested() else RequestKind.NOTHING


def requeue(environ: Mapping[str, str]) -> str | None:
    """Ask SLURM to run this job again; return what became of that, or None outside of SLURM."""
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
