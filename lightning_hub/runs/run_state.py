"""Decides the state of a run and of its ranks, with pure functions of one snapshot of its files.

A snapshot has durations and no times of day. The durations come from one monotonic clock: that of the reader between
two looks, or that of the machine if reader and run are on the same one. So different clocks do not change a verdict.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_hub.runs.records import ENDED, Heartbeat, Status

RANK_STATES = ("init", "train", "eval", "save", "exited", "failed", "silent", "stalled", "lost")


@dataclass(frozen=True)
class Limits:
    """Seconds without a change after which the state of a rank or run changes.

    Attributes:
        silent: The heartbeat of a rank has not changed.
        lost: Lease and heartbeats have not changed.
        stalled: The step has not changed in training; at least ``step_times`` median steps.
        step_times: See ``stalled``.
        other_phase: The step has not changed in ``init``, ``eval`` or ``save``.
    """

    silent: float = 10.0
    lost: float = 20.0
    stalled: float = 60.0
    step_times: float = 10.0
    other_phase: float = 1800.0

    def stall(self, phase: str, median_step_time: float | None) -> float:
        """Return the seconds for which the step may stay the same in a phase."""
        if phase != "train":
            return self.other_phase
        return max(self.stalled, self.step_times * (median_step_time or 0.0))


@dataclass(frozen=True)
class RankSnapshot:
    """One rank at one moment.

    Attributes:
        rank: Its number.
        node: Its node.
        heartbeat: Its last heartbeat, if there is one.
        seconds_without_heartbeat: Seconds since the last change of its heartbeat; None if unknown after one look.
        seconds_without_progress: Seconds since the last progress of its main thread or step; None if unknown.
        alive: Whether exactly its process runs; None if it is on another machine.
        exit_code: Its exit code, if its supervisor wrote one.
        has_error: Whether it wrote an ``error.json``.
    """

    rank: int
    node: int = 0
    heartbeat: Heartbeat | None = None
    seconds_without_heartbeat: float | None = None
    seconds_without_progress: float | None = None
    alive: bool | None = None
    exit_code: int | None = None
    has_error: bool = False


@dataclass(frozen=True)
class LeaseSnapshot:
    """The supervisor of one node at one moment; see ``RankSnapshot``."""

    node: int
    seconds_without_heartbeat: float | None = None
    alive: bool | None = None


@dataclass(frozen=True)
class RunSnapshot:
    """A run at one moment; ``status`` is None if it cannot be read."""

    status: Status | None
    ranks: tuple[RankSnapshot, ...] = ()
    leases: tuple[LeaseSnapshot, ...] = ()
    median_step_time: float | None = None
    owner_alive: bool | None = None


@dataclass(frozen=True)
class Verdict:
    """The state of a run for a reader; ``sure`` is false if one more look could change it."""

    state: str
    reason: str | None = None
    sure: bool = True


def rank_state(look: RankSnapshot, limits: Limits, median_step_time: float | None = None) -> str:
    """Return the state of one rank, one of ``RANK_STATES``."""
    phase = look.heartbeat.phase if look.heartbeat else "init"
    if look.has_error or look.exit_code:
        return "failed"
    if look.exit_code == 0 or (phase == "exit" and look.alive is not True):
        return "exited"
    if look.alive is False or (look.alive is None and _over(look.seconds_without_heartbeat, limits.lost)):
        return "lost"
    if _over(look.seconds_without_heartbeat, limits.silent):
        return "silent"
    if _over(look.seconds_without_progress, limits.stall(phase, median_step_time)):
        return "stalled"
    return "exited" if phase == "exit" else phase


def run_verdict(look: RunSnapshot, limits: Limits | None = None) -> Verdict:
    """Return the state of a run as a reader sees it."""
    limits = limits or Limits()
    if look.status is None:
        return Verdict("unknown", "its status cannot be read now", sure=False)
    failed = next((rank for rank in look.ranks if rank.has_error or rank.exit_code), None)
    if look.status.state in ENDED:
        if look.status.state == "finished" and failed is not None:
            return Verdict("failed", f"rank {failed.rank} ended with {failed.exit_code or 'an error'}")
        return Verdict(look.status.state, look.status.reason)
    if failed is not None:
        return Verdict("failed", f"rank {failed.rank} left an error or a non-zero exit code")
    return _active_verdict(look, look.status, limits)


def _active_verdict(look: RunSnapshot, status: Status, limits: Limits) -> Verdict:
    """Return the verdict on a run whose status says that it has not ended."""
    ranks_ended = [_has_ended(rank.alive, rank.seconds_without_heartbeat, limits) for rank in look.ranks]
    leases_ended = [_has_ended(lease.alive, lease.seconds_without_heartbeat, limits) for lease in look.leases]
    if not ranks_ended and not leases_ended:
        if look.owner_alive is False:
            return Verdict("lost", "the process that made it has ended")
        return Verdict(status.state, status.reason, sure=look.owner_alive is True)
    ended = [*ranks_ended, *leases_ended]
    if all(ended):
        return Verdict("lost", "its processes ended without writing a status")
    if leases_ended and all(leases_ended) and False in ranks_ended:
        return Verdict("orphan", "its ranks are still running, but their supervisor has ended")
    if stalled := _stalled(look, limits):
        return stalled
    return Verdict(status.state, _silent_reason(look, limits) or status.reason, sure=None not in ended)


def _has_ended(alive: bool | None, seconds_without_heartbeat: float | None, limits: Limits) -> bool | None:
    """Return whether a process has ended without writing a status; None if this is unknown after one look.

    On this machine the process table counts, because a process that is stopped by a signal has not ended.
    """
    if alive is not None:
        return not alive
    return None if seconds_without_heartbeat is None else seconds_without_heartbeat > limits.lost


def _stalled(look: RunSnapshot, limits: Limits) -> Verdict | None:
    stuck = [rank for rank in look.ranks if rank_state(rank, limits, look.median_step_time) == "stalled"]
    if not stuck or len(stuck) < len(look.ranks):
        silent = [
            rank for rank in look.ranks if _over(rank.seconds_without_heartbeat, max(limits.stalled, limits.silent))
        ]
        if not silent:
            return None
        stuck = silent
    behind = min(stuck, key=lambda rank: rank.heartbeat.step if rank.heartbeat else 0)
    beat = behind.heartbeat
    what = f", in {beat.doing}" if beat and beat.doing else ""
    return Verdict("stalled", f"no progress; rank {behind.rank} stays at step {beat.step if beat else 0}{what}")


def _silent_reason(look: RunSnapshot, limits: Limits) -> str | None:
    silent = [rank.rank for rank in look.ranks if _over(rank.seconds_without_heartbeat, limits.silent)]
    return f"rank {silent[0]} is silent" if silent else None


def _over(duration: float | None, limit: float) -> bool:
    return duration is not None and duration > limit
