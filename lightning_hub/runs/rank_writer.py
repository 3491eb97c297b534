"""Writes the files of a rank: its heartbeat, logs, metrics, and the error that ends it."""

from __future__ import annotations

import faulthandler
import re
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO, cast

from lightning_hub.errors import HubError, is_disk_trouble
from lightning_hub.runs.files import make_private_folder, open_append, write_json
from lightning_hub.runs.folder import RunFolder, now
from lightning_hub.runs.heartbeat import HeartbeatFile, PeriodicThread, RankActivity, heartbeat_period
from lightning_hub.runs.log_file import LogFile, Redirect, Tee
from lightning_hub.runs.metrics import MetricsWriter
from lightning_hub.runs.records import ErrorRecord
from lightning_hub.runs.timings import PhaseTimer
from lightning_hub.runs.writer import WriteErrors

STACKS_SIGNAL = signal.SIGUSR2
"""The signal that makes a rank write the Python stacks of all its threads (``stacks.txt``); then it continues."""

_LOST_PEER = re.compile(r"gloo/transport|NCCL error|Connection (closed|reset) by peer|Broken pipe")
_NO_MEMORY = re.compile(r"can't allocate memory|CUDA out of memory|std::bad_alloc")
_COMMUNICATION = ("DistBackendError", "DistNetworkError", "DistStoreError", "ConnectionError", "BrokenPipeError")


class RankWriter:
    """The files of one rank in one attempt.

    The training thread sets ``activity`` and calls ``log``. Other threads write the heartbeat.

    Args:
        folder: The run.
        attempt: Number of the attempt.
        rank: This rank.
        world_size: Number of ranks; with many ranks the heartbeat is less frequent.
        node: The node of this rank.
        trouble: Called with each error of writing; rank 0 uses the one of the ``RunWriter``.
    """

    def __init__(
        self,
        folder: RunFolder,
        attempt: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        node: int = 0,
        trouble: WriteErrors | None = None,
    ) -> None:
        self.folder = folder
        self.files = folder.rank(attempt, rank)
        self.rank = rank
        self.node = node
        self.activity = RankActivity()
        self.timer = PhaseTimer()
        self.trouble = trouble or WriteErrors()
        make_private_folder(self.files.path)
        self._metrics = MetricsWriter(folder.metrics, attempt)
        beat = HeartbeatFile(self.files.heartbeat, self.activity).write
        self._heartbeat = PeriodicThread("heartbeat", heartbeat_period(world_size), beat, self.trouble)
        self._streams: list[tuple[str, TextIO, LogFile]] = []
        self._stacks = -1

    def start(self, *, shown: bool = True) -> None:
        """Start the heartbeat and the logs.

        Args:
            shown: Whether output goes to the terminal and the log; false if the output of the process already goes to
                these files.

        Raises:
            OSError: The files cannot be made; the training has not started.
        """
        for name, path in (("stdout", self.files.stdout), ("stderr", self.files.stderr)):
            self._log(name, path, Tee if shown else Redirect)
        self._stacks = open_append(self.files.stacks)
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)
        self._heartbeat.start()

    def _log(self, name: str, path: Path, kind: type[Tee]) -> None:
        stream = cast(TextIO, getattr(sys, name))
        log = LogFile(path, self.trouble)
        setattr(sys, name, kind(stream, log))
        self._streams.append((name, stream, log))
        if name == "stderr":
            faulthandler.enable(file=log.descriptor)  # a native crash leaves its Python stack in the log

    def log(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Append a line to ``metrics.jsonl`` (rank 0); a full disk is reported once and does not stop the run."""
        try:
            self._metrics.write(step, values)
        except OSError as error:
            self.trouble(error)

    def stop_requested(self) -> bool:
        """Return whether there is a request to save and stop; for rank 0, between steps."""
        return self.folder.control_stop.exists()

    def checkpoint_requested(self) -> bool:
        """Return whether there is a request for a checkpoint; the request is removed, because it is done now."""
        try:
            self.folder.control_checkpoint.unlink()
        except OSError:  # usually there is no request
            return False
        return True

    def record_error(self, error: BaseException) -> Path:
        """Write ``error.json`` with the error that ends this rank; return its path."""
        hub = error if isinstance(error, HubError) else None
        record = ErrorRecord(
            time=now(),
            type=type(error).__name__,
            message=hub.message if hub else str(error),
            traceback="".join(traceback.format_exception(error)),
            rank=self.rank,
            node=self.node,
            step=self.activity.step,
            kind=classify(error),
            where=hub.where if hub else None,
            remedy=hub.remedy if hub else None,
        )
        try:
            write_json(self.files.error, record.to_json(), fsync=True, indent=1)
        except OSError as trouble:
            self.trouble(trouble)
        return self.files.error

    def close(self) -> None:
        """Write the last heartbeat and restore the standard streams."""
        self.activity.phase = "exit"
        self.activity.begin("")
        self._heartbeat.stop()
        self._metrics.close()
        if self._stacks >= 0:
            faulthandler.unregister(STACKS_SIGNAL)
        for name, stream, log in self._streams:
            if name == "stderr":
                faulthandler.enable(file=stream) if _has_descriptor(stream) else faulthandler.disable()
            setattr(sys, name, stream)
            log.close()
        self._streams.clear()


def _has_descriptor(stream: TextIO) -> bool:
    try:
        return stream.fileno() >= 0
    except OSError:  # a stream of a test or a notebook has no descriptor
        return False


def classify(error: BaseException) -> str:
    """Return the ``class`` of an error in ``error.json``."""
    names = {base.__name__ for base in type(error).__mro__}
    if isinstance(error, HubError):
        return error.kind
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names or _NO_MEMORY.search(str(error)):
        return "oom"
    if names.intersection(_COMMUNICATION) or (type(error) is RuntimeError and _LOST_PEER.search(str(error))):
        return "comm"  # gloo raises a plain RuntimeError for a lost rank
    if is_disk_trouble(error):
        return "disk"
    if isinstance(error, FloatingPointError):
        return "nan"
    return "signal" if isinstance(error, KeyboardInterrupt) else "internal"
