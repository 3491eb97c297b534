"""Reads a run for the user: its state, its ranks, its progress and its errors."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lightning_hub.runs.files import Json, read_json
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.metrics import Line, Metric, last_values, parse_line, resumed_steps, valid_lines
from lightning_hub.runs.process_identity import ProcessIdentity, boot_id
from lightning_hub.runs.records import ENDED, Attempt, ErrorRecord, Heartbeat, Lease, RunInfo, Status, newer_schema
from lightning_hub.runs.run_state import (
    LeaseSnapshot,
    Limits,
    RankSnapshot,
    RunSnapshot,
    Verdict,
    rank_state,
    run_verdict,
)

_TAIL = 1 << 14
_STEPS_FOR_MEDIAN = 50


@dataclass(frozen=True)
class RankView:
    """One rank, as ``runs show`` prints it."""

    rank: int
    node: int
    step: int
    phase: str
    state: str
    age: float | None
    doing: str
    loss: float | str | None

    def to_json(self) -> dict[str, Json]:
        """Return the form of ``runs show --json``."""
        return {
            "rank": self.rank,
            "node": self.node,
            "step": self.step,
            "phase": self.phase,
            "age": self.age,
            "state": self.state,
            "doing": self.doing,
            "loss": self.loss,
        }


@dataclass(frozen=True)
class RunView:
    """A run, as ``runs list`` and ``runs show`` print it.

    Attributes:
        folder: The run folder.
        info: The content of ``run.json``.
        status: The state that the supervisor wrote.
        verdict: The state that the reader found.
        step: Number of finished steps.
        loss: The newest loss.
        tokens_per_second: The newest rate.
        age: Seconds since the last heartbeat or write.
        ranks: Each rank of the newest attempt.
        note: A sentence about what the reader cannot understand, or None.
    """

    folder: RunFolder
    info: RunInfo
    status: Status
    verdict: Verdict
    step: int
    loss: Metric
    tokens_per_second: Metric
    age: float | None
    ranks: tuple[RankView, ...]
    note: str | None

    @property
    def is_live(self) -> bool:
        """Whether a process of the run is running, or may be running on another machine."""
        return self.verdict.state not in {*ENDED, "lost"}

    def to_json(self) -> dict[str, Json]:
        """Return the form of ``runs list --json``."""
        return {
            "id": self.folder.id,
            "path": str(self.folder.path.absolute()),
            "state": self.verdict.state,
            "method": self.info.method,
            "model": self.info.model,
            "step": self.step,
            "max_steps": self.status.max_steps,
            "loss": self.loss,
            "tokens_per_second": self.tokens_per_second,
            "age": self.age,
            "name": self.info.name,
            "created": self.info.created,
            "reason": self.verdict.reason,
            "sure": self.verdict.sure,
            "note": self.note,
        }


@dataclass
class _Watch:
    """The time at which each value had its last change, by the clock of the reader."""

    seen: dict[str, tuple[int, float]] = field(default_factory=dict)

    def unchanged_for(self, key: str, value: int, now: float) -> float | None:
        """Return the seconds for which a value has not changed; None at the first look, when this is unknown."""
        before = self.seen.get(key)
        if before is None or before[0] != value:
            self.seen[key] = (value, now)
            return None if before is None else 0.0
        return now - before[1]


class RunReader:
    """Reads one run repeatedly; from the second look on it knows what has changed."""

    def __init__(self, folder: RunFolder, limits: Limits | None = None) -> None:
        self.folder = folder
        self.limits = limits or Limits()
        self._watch = _Watch()

    def look(self, now: float | None = None) -> RunView:
        """Return the current state of the run.

        Args:
            now: The time of the reader's monotonic clock; by default the real time.
        """
        clock = time.monotonic() if now is None else now
        data = read_json(self.folder.status)
        status = Status.from_json(data)
        lines = self._newest_lines()
        ranks = tuple(self._ranks(clock))
        look = RunSnapshot(
            status=status if data is not None else None,
            ranks=ranks,
            leases=tuple(self._leases(clock)),
            median_step_time=_median(lines),
            owner_alive=self._owner_alive(),
        )
        return self._view(status, look, lines)

    def _view(self, status: Status, look: RunSnapshot, lines: list[Line]) -> RunView:
        info = self.folder.info()
        views = tuple(self._rank_view(rank, look.median_step_time) for rank in look.ranks)
        values = last_values(lines, "loss", "tokens_per_second", "step")
        logged = values["step"] if isinstance(values["step"], int) else 0
        beats = [rank.step for rank in views]
        return RunView(
            folder=self.folder,
            info=info,
            status=status,
            verdict=run_verdict(look, self.limits),
            step=max([status.step, logged, *beats]),
            loss=values["loss"],
            tokens_per_second=values["tokens_per_second"],
            age=self._age(views),
            ranks=views,
            note=newer_schema(info),
        )

    def _ranks(self, now: float) -> Iterator[RankSnapshot]:
        attempts = self.folder.attempts()
        if not attempts:
            return
        attempt = attempts[-1]
        children = self._children(attempt)
        for rank in self.folder.ranks(attempt):
            yield self._rank(attempt, rank, children.get(rank, {}), now)

    def _rank(self, attempt: int, rank: int, child: dict[str, Json], now: float) -> RankSnapshot:
        files = self.folder.rank(attempt, rank)
        data = read_json(files.heartbeat)
        beat = Heartbeat.from_json(data) if data is not None else None
        exit_code, node = child.get("exit_code"), child.get("node")
        still = stuck = None
        if beat is not None:
            still = self._still(f"rank {attempt}/{rank}", beat.seq, beat.mono, beat.boot_id, now)
            stood = self._watch.unchanged_for(f"step {attempt}/{rank}", beat.step, now) or 0.0
            stuck = max(stood, beat.mono - beat.doing_since + (still or 0.0))
        return RankSnapshot(
            rank=rank,
            node=node if isinstance(node, int) else 0,
            heartbeat=beat,
            seconds_without_heartbeat=still,
            seconds_without_progress=stuck,
            alive=_alive(data, child),
            exit_code=exit_code if isinstance(exit_code, int) else None,
            has_error=files.error.exists(),
        )

    def _still(self, key: str, seq: int, mono: float, boot: str, now: float) -> float | None:
        """Return the seconds since the last change of a sequence number.

        On the same machine this is exact, by the monotonic clock; else it is the time between two looks.
        """
        between = self._watch.unchanged_for(key, seq, now)
        if boot == boot_id():
            return max(time.monotonic() - mono, 0.0)
        return between

    def _leases(self, now: float) -> Iterator[LeaseSnapshot]:
        for node in self.folder.nodes():
            data = read_json(self.folder.node(node).lease)
            if data is None:
                continue
            lease = Lease.from_json(data)
            identity = ProcessIdentity.from_json(data)
            still = self._still(f"lease {node}", lease.seq, lease.mono, lease.boot_id, now)
            yield LeaseSnapshot(node, still, identity.is_alive() if identity else None)

    def _children(self, attempt: int) -> dict[int, dict[str, Json]]:
        """Return the records of the supervisors about the ranks of an attempt."""
        found: dict[int, dict[str, Json]] = {}
        for node in self.folder.nodes():
            data = read_json(self.folder.node(node).lease)
            lease = Lease.from_json(data)
            if lease.attempt != attempt:
                continue
            for child in lease.children:
                rank = child.get("rank")
                if isinstance(rank, int):
                    found[rank] = {**child, "node": node, "boot_id": lease.boot_id, "host": lease.host}
        return found

    def _owner_alive(self) -> bool | None:
        owner = ProcessIdentity.from_json(read_json(self.folder.lock) or {})
        return owner.is_alive() if owner else None

    def _rank_view(self, look: RankSnapshot, median: float | None) -> RankView:
        beat = look.heartbeat or Heartbeat()
        age = look.seconds_without_heartbeat if look.heartbeat else None
        state = rank_state(look, self.limits, median)
        shown = None if age is None else round(age, 1)
        return RankView(look.rank, look.node, beat.step, beat.phase, state, shown, beat.doing, beat.loss)

    def _age(self, ranks: tuple[RankView, ...]) -> float | None:
        """Return the seconds since the last heartbeat, or without heartbeats since the last write of a file."""
        exact = [rank.age for rank in ranks if rank.age is not None]
        if exact:
            return min(exact)
        times = []
        for path in (self.folder.status, self.folder.run_json, self.folder.metrics):
            try:
                times.append(path.stat().st_mtime)
            except OSError:
                continue
        return round(max(time.time() - max(times), 0.0), 1) if times else None

    def _newest_lines(self) -> list[Line]:
        """Return the valid lines at the end of the metrics; only the end of the file is read."""
        lines = [line for line in map(parse_line, _tail(self.folder.metrics)) if line is not None]
        return valid_lines(lines, resumed_steps(self.folder))


def _alive(beat: dict[str, Json] | None, child: dict[str, Json]) -> bool | None:
    for data in (child, beat or {}):
        identity = ProcessIdentity.from_json(data)
        if identity is not None:
            return identity.is_alive()
    return None


def _tail(path: Path) -> list[bytes]:
    try:
        with path.open("rb") as file:
            begin = max(file.seek(0, os.SEEK_END) - _TAIL, 0)
            file.seek(begin)
            lines = file.read().split(b"\n")
    except OSError:
        return []
    return lines[1 if begin else 0 : -1]


def _median(lines: list[Line]) -> float | None:
    times = [line["step_time"] for line in lines[-_STEPS_FOR_MEDIAN:] if isinstance(line.get("step_time"), float)]
    return statistics.median(value for value in times if isinstance(value, float)) if times else None


def read_run(folder: RunFolder) -> RunView:
    """Look at a run once."""
    return RunReader(folder).look()


def attempts_of(folder: RunFolder) -> list[Attempt]:
    """Return the records of all attempts, the first first."""
    return [Attempt.from_json(read_json(folder.attempt_json(number))) for number in folder.attempts()]


def first_error(folder: RunFolder) -> ErrorRecord | None:
    """Return the earliest error of the newest attempt that has errors; the first error is the root cause."""
    for attempt in reversed(folder.attempts()):
        found = [read_json(folder.rank(attempt, rank).error) for rank in folder.ranks(attempt)]
        errors = [ErrorRecord.from_json(data) for data in found if data is not None]
        if errors:
            return min(errors, key=lambda error: error.time)
    return None
