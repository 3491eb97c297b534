"""The log of a rank on disk, in complete lines: the first megabyte and the newest parts are kept.

Parts are appended to and never renamed, so that the byte offsets of a reader stay valid. ``stdout.log`` has the
beginning of the log, ``stdout.log.1``, ``.2`` ... have the rest. The newest two of the numbered parts are kept.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from lightning_hub.runs.files import open_append
from lightning_hub.runs.terminal import TerminalStream

FIRST_PART = 1_000_000
LATER_PART = 4_000_000
KEPT_PARTS = 2
_LONGEST_LINE = 1 << 20


def log_parts(first: Path) -> list[Path]:
    """Return the parts of a log that exist, oldest first."""
    prefix = f"{first.name}."
    try:
        names = [entry.name for entry in os.scandir(first.parent) if entry.name.startswith(prefix)]
    except OSError:
        return []
    numbers = sorted(int(name[len(prefix) :]) for name in names if name[len(prefix) :].isdigit())
    begun = [first] if first.exists() else []
    return [*begun, *(first.with_name(f"{first.name}.{number}") for number in numbers)]


class LogFile:
    """Appends text to a log, line by line. An error of writing is reported, not raised.

    Args:
        first: Path of the first part.
        trouble: Called with each error of writing.

    Raises:
        OSError: The log cannot be opened at all.
    """

    def __init__(self, first: Path, trouble: Callable[[OSError], None]) -> None:
        self._first = first
        self._trouble = trouble
        self._partial = ""
        parts = log_parts(first)
        self._number = int(parts[-1].name.rpartition(".")[2]) if len(parts) > 1 else 0
        self._lock = threading.Lock()
        self._torn = False
        self._open()

    def _path(self, number: int) -> Path:
        return self._first.with_name(f"{self._first.name}.{number}") if number else self._first

    def _open(self) -> None:
        self._descriptor = open_append(self._path(self._number))
        self._size = os.fstat(self._descriptor).st_size

    def write(self, text: str) -> None:
        """Append text. The text after the last newline is kept until its line is complete.

        A progress bar draws its line again after a carriage return; only the last state of the line is kept.
        """
        with self._lock:
            *lines, partial = (self._partial + text).split("\n")
            self._partial = _still_drawn(partial)
            if len(self._partial) > _LONGEST_LINE:
                lines, self._partial = [*lines, self._partial], ""
            if lines:
                self._append("".join(f"{_last_drawn(line)}\n" for line in lines).encode("utf-8", "backslashreplace"))

    def _append(self, data: bytes) -> None:
        if self._torn:  # the disk was full inside a line: the next line needs a newline before it
            data = b"\n" + data
        try:
            while data:
                written = os.write(self._descriptor, self._next_piece(data))
                self._size += written
                self._torn = data[written - 1 : written] != b"\n"
                data = data[written:]
        except OSError as error:
            self._trouble(error)

    def _next_piece(self, data: bytes) -> bytes:
        """Return the complete lines that fit into this part, at least one; if none fits, open the next part."""
        free = (LATER_PART if self._number else FIRST_PART) - self._size
        end = data.rfind(b"\n", 0, max(free, 0)) + 1
        if not end and self._size and not self._torn:
            self._rotate()
            end = data.rfind(b"\n", 0, LATER_PART) + 1
        return data[: end or data.index(b"\n") + 1]

    def _rotate(self) -> None:
        os.close(self._descriptor)
        self._number += 1
        self._open()
        if self._number > KEPT_PARTS:
            self._path(self._number - KEPT_PARTS).unlink(missing_ok=True)

    def close(self) -> None:
        """Write the unfinished last line and close."""
        if self._partial:
            self.write("\n")
        os.close(self._descriptor)

    @property
    def descriptor(self) -> int:
        """The open file, for writers that do not use Python's streams (``faulthandler``)."""
        return self._descriptor


def _last_drawn(line: str) -> str:
    """Return the visible text of a finished line: the text after its last carriage return inside the line."""
    return line.rstrip("\r").rpartition("\r")[2]


def _still_drawn(partial: str) -> str:
    """Return the part of an unfinished line to keep; a carriage return at its end can belong to a newline."""
    body = partial.rstrip("\r")
    return body.rpartition("\r")[2] + ("\r" if len(body) < len(partial) else "")


class Tee:
    """A text stream that writes to a stream and to a log; other attributes are those of the stream.

    If the stream cannot be written any more, only the log is written.
    """

    def __init__(self, stream: TextIO, log: LogFile) -> None:
        self.stream = TerminalStream(stream)
        self._log = log

    def write(self, text: str) -> int:
        """Write to both. Neither raises; an error of the log is reported once."""
        self._log.write(text)
        return self.stream.write(text)

    def writelines(self, lines: list[str]) -> None:
        """Write each line to both."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


class Redirect(Tee):
    """A text stream that writes to a log only, because the descriptor of the stream is already this log."""

    def write(self, text: str) -> int:
        """Write to the log."""
        self._log.write(text)
        return len(text)
