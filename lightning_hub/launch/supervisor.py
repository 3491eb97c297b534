"""Runs the ranks of an attempt on this machine: shows the log of rank 0, forwards signals, writes the end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

from lightning_hub.errors import ExitCode
from lightning_hub.launch.local import FORWARDED_SIGNALS, RankExit, RankGroup, RunningRanks, start_ranks
from lightning_hub.launch.watch import SilenceWatch
from lightning_hub.runs.files import Json, read_json, write_json
from lightning_hub.runs.folder import RunFolder, now
from lightning_hub.runs.logs import LogTail
from lightning_hub.runs.process_identity import ProcessIdentity
from lightning_hub.runs.records import ENDED, ErrorRecord, Heartbeat
from lightning_hub.runs.stopping import AT_ONCE
from lightning_hub.runs.writer import RunWriter

SIMULTANEOUS_SECONDS = 1.0
"""Ranks that fail within so many seconds fail for one reason."""

EXPLAINED_EXIT_CODES = {0, int(ExitCode.STOPPED), int(ExitCode.HARD_STOP)}
"""Exit codes that are not failures: the rank or the user has given the reason."""


def supervise(run: RunWriter, group: RankGroup) -> int:
    """Start the ranks of an attempt, wait for them, and return the exit code of the run.

    The exit code is that of the rank that failed first. A signal reaches all ranks or none: SIGTERM, SIGUSR1 and the
    first SIGINT are forwarded as requests, a second SIGINT kills the ranks.
    """
    echo = [
        LogForwarder(group.folder.rank(group.attempt, 0).stdout, sys.stdout),
        LogForwarder(group.folder.rank(group.attempt, 0).stderr, sys.stderr),
    ]
    with start_ranks(group) as ranks, _signals_to(ranks) as interrupts:
        run.tell_children(_children(ranks))

        silence = SilenceWatch(run, group)
        ended: list[bool] = []

        def on_poll() -> None:
            for stream in echo:
                stream.forward()
            run.children = [child | {"exit_code": _code(ranks, child["rank"])} for child in run.children]

            silence.poll(ranks.running)
            if not ended and group.folder.control_stop_now.exists():
                ended.append(True)
                ranks.end()

        ranks.wait(on_poll)
    if len(interrupts) > 1 or ended:
        return _hard_stop(run)
    return _finish_status(run, group, first_failure(group, ranks))


class LogForwarder:
    """Copies complete lines of a log to the terminal, as long as it is open."""

    def __init__(self, log: Path, stream: TextIO) -> None:
        self._tail = LogTail(log)
        self._stream: TextIO | None = stream

    def forward(self) -> None:
        """Print new lines; when the terminal is closed, printing ends and the run continues."""
        lines = self._tail.read()
        if self._stream is None or not lines:
            return
        try:
            self._stream.write("".join(f"{line.decode('utf-8', 'replace')}\n" for line in lines))
            self._stream.flush()
        except OSError:
            self._stream = None


def first_failure(group: RankGroup, ranks: RunningRanks) -> RankExit | None:
    """Return the exit of the rank whose failure caused the others, or None if none failed.

    When a rank ends, the others fail soon after it in a collective. Such an error is the cause only if there is no
    other one. Ranks that were ended here are never the cause. Of ranks that fail together, the lowest is returned.
    """
    failed = [ending for ending in ranks.endings.values() if ending.code != 0 and not ending.ended_here]
    causes = [ending for ending in failed if not _is_consequence(group, ending)] or failed
    first = min((ending.at for ending in causes), default=0.0)
    together = [ending for ending in causes if ending.at - first < SIMULTANEOUS_SECONDS]
    return min(together, key=lambda ending: ending.rank, default=None)


def _is_consequence(group: RankGroup, ending: RankExit) -> bool:
    error = read_json(group.folder.rank(group.attempt, ending.rank).error)
    return ending.code > 0 and error is not None and error.get("class") == "comm"


def _finish_status(run: RunWriter, group: RankGroup, failure: RankExit | None) -> int:
    """Write the status of the run from the exits of its ranks, and return its exit code."""
    run.refresh()
    if failure is None:
        return ExitCode.DONE
    if failure.code in EXPLAINED_EXIT_CODES and run.status.state in ENDED:
        return failure.code
    files = group.folder.rank(group.attempt, failure.rank)
    record = ErrorRecord.from_json(read_json(files.error))
    if not files.error.exists():
        record = _rank_died_record(group.folder, group.attempt, failure)
        write_json(files.error, record.to_json(), fsync=True, indent=1)
    sentence = f"rank {failure.rank}: {record.message}"
    if failure.rank != 0 or failure.code < 0:  # the messages of rank 0 were shown already
        log = files.stderr.relative_to(group.folder.path.parent)
        print(f"error: {sentence}; see {log}", file=sys.stderr)
    code = failure.code if failure.code > 0 else int(ExitCode.FAILED)
    run.set_status("failed", reason=sentence, step=max(run.status.step, record.step), exit_code=code, error=files.error)
    return code


def _rank_died_record(folder: RunFolder, attempt: int, ending: RankExit) -> ErrorRecord:
    """Return the error record of a rank that could not write one."""
    beat = Heartbeat.from_json(read_json(folder.rank(attempt, ending.rank).heartbeat))
    doing = f", in {beat.doing}" if beat.doing else ""
    if ending.code < 0:
        name = signal.Signals(-ending.code).name
        kind, what = "signal", f"killed by {name} at step {beat.step}{doing}"
    else:
        kind, what = "internal", f"ended with exit code {ending.code} at step {beat.step}{doing}"
    remedy = "the machine may have run out of memory: see dmesg" if ending.code == -signal.SIGKILL else None
    return ErrorRecord(now(), "RankDied", what, "", ending.rank, 0, beat.step, kind, None, remedy)


def _hard_stop(run: RunWriter) -> int:
    run.refresh()
    run.set_status("failed", reason=AT_ONCE, exit_code=int(ExitCode.HARD_STOP))
    print(AT_ONCE, file=sys.stderr)
    return ExitCode.HARD_STOP


def _children(ranks: RunningRanks) -> list[dict[str, Json]]:
    found: list[dict[str, Json]] = []
    for rank, process in ranks.processes.items():
        identity = ProcessIdentity.of(process.pid)
        start = identity.start if identity else 0.0
        found.append({"rank": rank, "pid": process.pid, "pid_start": start, "exit_code": None})
    return found


def _code(ranks: RunningRanks, rank: Json) -> int | None:
    ending = ranks.endings.get(int(str(rank)))
    return None if ending is None else ending.code


@contextmanager
def _signals_to(ranks: RunningRanks) -> Iterator[list[int]]:
    """Forward signals to all ranks during the block; yields the interrupts that have come."""
    interrupts: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            interrupts.append(number)
        ranks.signal(signal.SIGKILL if len(interrupts) > 1 else number)

    before = {number: signal.signal(number, pass_on) for number in FORWARDED_SIGNALS}
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a run continues when its terminal is closed
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def rank_command(config: Path, *flags: str) -> list[str]:
    """Return the command of a rank: the same interpreter, with all options in a file."""
    return [sys.executable, "-m", "lightning_hub", "fit", "--config", os.fspath(config), *flags]
