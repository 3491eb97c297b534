"""Reads the heartbeats of the ranks: reports a rank that is silent, and one that is back."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import psutil

from lightning_hub.launch.local import RankGroup
from lightning_hub.runs.files import open_append, read_json
from lightning_hub.runs.heartbeat import heartbeat_period
from lightning_hub.runs.log_file import log_parts
from lightning_hub.runs.records import Heartbeat
from lightning_hub.runs.run_state import Limits
from lightning_hub.runs.writer import RunWriter

_PERIOD = 1.0
_MISSED_BEATS = 2.5


class SilenceWatch:
    """Writes to the log of rank 0, and so to the terminal, when a rank gives no sign of life.

    Args:
        run: Gets an event for it.
        group: The ranks.
    """

    def __init__(self, run: RunWriter, group: RankGroup) -> None:
        self._run = run
        self._group = group
        self._limit = max(Limits().silent, _MISSED_BEATS * heartbeat_period(group.world_size))
        self._silent: dict[int, float] = {}
        """When each silent rank gave its last sign of life."""
        self._next = 0.0

    def poll(self, running: Sequence[int]) -> None:
        """Read the heartbeats of the running ranks, at most once a second."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _PERIOD
        for rank in running:
            data = read_json(self._group.folder.rank(self._group.attempt, rank).heartbeat)
            if data is not None:  # without one it is still importing
                self._judge(rank, Heartbeat.from_json(data), now)

    def _judge(self, rank: int, beat: Heartbeat, now: float) -> None:
        still = now - beat.mono
        if rank not in self._silent and still > self._limit:
            self._silent[rank] = beat.mono
            self._tell(f"warning: {_stands(rank, beat, still)}; see lightning-hub runs show {self._run.folder.id}")
            self._run.event("silent", rank=rank, step=beat.step, doing=beat.doing, seconds=round(still, 1))
        elif rank in self._silent and still <= self._limit:
            silence = beat.mono - self._silent.pop(rank)
            self._tell(f"note: rank {rank} gives signs of life again after {silence:.0f} s, at step {beat.step}")
            self._run.event("heard again", rank=rank, step=beat.step, seconds=round(silence, 1))

    def _tell(self, text: str) -> None:
        log = self._group.folder.rank(self._group.attempt, 0).stderr
        try:
            descriptor = open_append(log_parts(log)[-1])
            try:
                os.write(descriptor, f"{text}\n".encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            self._run.trouble(error)


def _stands(rank: int, beat: Heartbeat, still: float) -> str:
    doing = f", in {beat.doing}" if beat.doing else ""
    text = f"rank {rank} has given no sign of life for {still:.0f} s: it is at step {beat.step}{doing}"
    try:
        if psutil.Process(beat.pid).status() == psutil.STATUS_STOPPED:
            return f"{text}; its process is stopped, kill -CONT {beat.pid} continues it"
    except psutil.Error:
        pass
    return f"{text} (process {beat.pid})"
