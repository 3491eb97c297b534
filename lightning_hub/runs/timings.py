"""Measures the time of a process, phase by phase."""

from __future__ import annotations

import time
from typing import Literal, TypeAlias

import psutil

PhaseName: TypeAlias = Literal[
    "imports", "setup", "data", "model", "first step", "steps", "validation", "saving", "teardown", "export"
]


class PhaseTimer:
    """Adds up the seconds of each phase; exactly one phase is active at any time.

    The first phase, ``imports``, begins with the process, because the user also waits for the imports of torch and
    other libraries.
    """

    def __init__(self) -> None:
        self._seconds: dict[PhaseName, float] = {}
        self._phase: PhaseName = "imports"
        self._since = time.monotonic() - _age_of_process()

    @property
    def phase(self) -> PhaseName:
        """The active phase."""
        return self._phase

    def enter(self, phase: PhaseName) -> PhaseName:
        """End the active phase, begin another, and return the phase that has ended."""
        now, ended = time.monotonic(), self._phase
        self._seconds[ended] = self._seconds.get(ended, 0.0) + now - self._since
        self._phase, self._since = phase, now
        return ended

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase until now, in the order in which the phases first began."""
        running = time.monotonic() - self._since
        found = {**self._seconds, self._phase: self._seconds.get(self._phase, 0.0) + running}
        return {phase: round(seconds, 3) for phase, seconds in found.items()}


def _age_of_process() -> float:
    return max(0.0, time.time() - psutil.Process().create_time())
