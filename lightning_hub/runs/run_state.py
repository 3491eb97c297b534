"""What is the matter with a run: pure rules over one look at its files.

A look holds durations, never times of day: they come from one monotonic clock (the reader's own between two looks,
or that of the machine on which reader and run both live), so that clocks that disagree change no verdict.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_hub.runs.records import ENDED, Heartbeat, Status

RANK_STATES = ("init", "train", "eval", "save", "exited", "failed", "silent", "stalled", "lost")


@dataclass(frozen=True)
class Limits:
    """Seconds after which stillness means something.

    Attributes:
        silent: A rank's heartbeat has not moved.
        lost: Lease and heartbeats have not moved.
        stalled: The step has not moved while training; at least ``step_times`` median steps.
        step_times: See ``stalled``.
        other_phase: The step has not moved in ``init``, ``eval`` or ``save``.
    """

    silent: float = 10.0
    lost: float = 20.0
    stalled: float = 60.0
    step_times: float = 10.0
    other_phase: float = 1800.0

    def stall(self, phase: str, median_step_time: float | None) -> float:
        """Return how long the step may stand in a phase."""
        if phase != "train":
            return self.other_phase
        return max(self.stalled, self.step_times * (median_step_time or 0.0))


@dataclass(frozen=True)
class RankSnapshot:
    """One rank at one moment.

    Attributes:
        rank: Its number.
        node: The node it runs on.
        heartbeat: What it last said, if anything.
        still: Seconds since its heartbeat moved; None when one look cannot tell.
        stuck: Seconds for which its main thread or its step has not moved; None likewise.
        alive: Whether its very process runs; None when another machine hides it.
        exit_code: How it ended, if its supervisor saw that.
        has_error: Whether it left an error.json.
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
    """A run at one moment; ``status`` is None when it cannot be read."""

    status: Status | None
    ranks: tuple[RankSnapshot, ...] = ()
    leases: tuple[LeaseSnapshot, ...] = ()
    median_step_time: float | None = None
    owner_alive: bool | None = None


@dataclass(frozen=True)
class Verdict:
    """The state of a run for a reader, and whether one more look could change it."""

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
        return Verdict("failed", f"rank {failed.rank} left an error or a non-zero exit")
    return _living(look, look.status, limits)


def _living(look: RunSnapshot, status: Status, limits: Limits) -> Verdict:
    """Judge a run whose status says that it goes on."""
    ranks_gone = [_gone(rank.alive, rank.seconds_without_heartbeat, limits) for rank in look.ranks]
    leases_gone = [_gone(lease.alive, lease.seconds_without_heartbeat, limits) for lease in look.leases]
    if not ranks_gone and not leases_gone:
        if look.owner_alive is False:
            return Verdict("lost", "the process that made it is gone")
        return Verdict(status.state, status.reason, sure=look.owner_alive is True)
    gone = [*ranks_gone, *leases_gone]
    if all(gone):
        return Verdict("lost", "its processes are gone without a word")
    if leases_gone and all(leases_gone) and False in ranks_gone:
        return Verdict("orphan", "ranks run on without their supervisor")
    if stalled := _stalled(look, limits):
        return stalled
    return Verdict(status.state, _silent_reason(look, limits) or status.reason, sure=None not in gone)


def _gone(alive: bool | None, still: float | None, limits: Limits) -> bool | None:
    """Say whether something has ended without a word; None when one look cannot tell.

    A process of this machine is asked itself: one that is stopped stands still and is not gone.
    """
    if alive is not None:
        return not alive
    return None if still is None else still > limits.lost


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
    return Verdict(
        "stalled", f"no step is finished any more; rank {behind.rank} stands at {beat.step if beat else 0}{what}"
    )


def _silent_reason(look: RunSnapshot, limits: Limits) -> str | None:
    silent = [rank.rank for rank in look.ranks if _over(rank.seconds_without_heartbeat, limits.silent)]
    return f"rank {silent[0]} is silent" if silent else None


def _over(duration: float | None, limit: float) -> bool:
    return duration is not None and duration > limit
