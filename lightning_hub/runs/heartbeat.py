"""The heartbeat of a rank: a separate thread writes to a file what the main thread is doing."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

from lightning_hub.runs.files import write_atomic
from lightning_hub.runs.folder import now
from lightning_hub.runs.metrics import to_json_number
from lightning_hub.runs.process_identity import ProcessIdentity
from lightning_hub.runs.records import Phase

MAX_HEARTBEAT_BYTES = 512
_DOING_CHARACTERS = 64
_DOING_BYTES = 96
_MANY_RANKS = 64


class RankActivity:
    """What a rank is doing now. Setting an attribute or calling ``begin`` takes less than a microsecond.

    One thread sets the attributes, another reads them. Each assignment is atomic, so no lock is needed.

    Attributes:
        step: Number of finished optimizer steps.
        epoch: The current epoch.
        phase: init, train, eval, save or exit.
        loss: The last known loss.
        doing: What the main thread began last.
        doing_since: When it began, by the monotonic clock.
    """

    __slots__ = ("doing", "doing_since", "epoch", "loss", "phase", "step")

    def __init__(self) -> None:
        self.step = 0
        self.epoch = 0
        self.phase: Phase = "init"
        self.loss: float | None = None
        self.doing = ""
        self.doing_since = time.monotonic()

    def begin(self, what: str) -> None:
        """Set what begins now: ``forward 2/4``, ``optimizer``, ``save shard``."""
        self.doing_since = time.monotonic()
        self.doing = what


def heartbeat_period(world_size: int) -> float:
    """Return the seconds between heartbeats; longer with many ranks, which share a file system."""
    return 2.0 if world_size <= _MANY_RANKS else 10.0


class PeriodicThread(threading.Thread):
    """Calls a function at once and then every ``period`` seconds, until ``stop``; a failed write is reported once."""

    def __init__(self, name: str, period: float, beat: Callable[[], None], trouble: Callable[[OSError], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._period = period
        self._beat = beat
        self._trouble = trouble
        self._stopping = threading.Event()

    def run(self) -> None:
        """Call the function until ``stop``."""
        self.once()
        while not self._stopping.wait(self._period):
            self.once()

    def once(self) -> None:
        """Call the function now."""
        try:
            self._beat()
        except OSError as error:
            self._trouble(error)

    def stop(self) -> None:
        """Stop, with a last call so that the files have the final state."""
        self._stopping.set()
        if self.is_alive():
            self.join()
        self.once()


class HeartbeatFile:
    """Writes ``heartbeat.json`` from the activity of a rank."""

    def __init__(self, path: Path, activity: RankActivity) -> None:
        self._path = path
        self._activity = activity
        self._identity = ProcessIdentity.own()
        self._seq = 0

    def write(self) -> None:
        """Write the next heartbeat.

        Raises:
            OSError: The file could not be written.
        """
        self._seq += 1
        write_atomic(self._path, self.content())

    def content(self) -> bytes:
        """Return the JSON of this heartbeat, at most 512 bytes."""
        activity, identity = self._activity, self._identity
        record = {
            "seq": self._seq,
            "time": now(),
            "mono": round(time.monotonic(), 3),
            "step": activity.step,
            "epoch": activity.epoch,
            "phase": activity.phase,
            "doing": _short(activity.doing),
            "doing_since": round(activity.doing_since, 3),
            "loss": to_json_number(activity.loss),
            "pid": identity.pid,
            "pid_start": identity.start,
            "boot_id": identity.boot,
        }
        data = json.dumps(record, ensure_ascii=False).encode()
        assert len(data) <= MAX_HEARTBEAT_BYTES, f"a heartbeat of {len(data)} bytes"
        return data


def _short(text: str) -> str:
    printable = "".join(char if char.isprintable() and char not in '"\\' else " " for char in text[:_DOING_CHARACTERS])
    return printable.encode("utf-8", "replace")[:_DOING_BYTES].decode("utf-8", "ignore")
