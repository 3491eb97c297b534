"""Read logs of any size: an index of lines, the last lines, new lines, only errors, or several ranks merged by time.

The text of a log is not kept in memory: only offsets are kept, and the requested lines are read. Escape sequences,
markup and invalid characters of a log are shown as text and have no effect on the terminal.
"""

from __future__ import annotations

import heapq
import os
import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lightning_hub.runs.log_file import log_parts

SHOWN_CHARACTERS = 4096
_CHUNK = 1 << 18
_MAX_STEP = 8 << 20
_TIME = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,6})?(?:Z|[+-]\d\d:?\d\d)?")
_ERROR = re.compile(r".*(\b\w*(Error|Exception)\b|\b(ERROR|FATAL|CRITICAL)\b|Segmentation fault)")
_INDENTED = re.compile(r"^(\s+\S|$)")


def printable(line: bytes, limit: int = SHOWN_CHARACTERS) -> str:
    """Return a line of a log as text without escape sequences that a terminal would execute.

    Args:
        line: The bytes of one line, with or without its newline.
        limit: Maximum number of characters; the number of the other characters is shown.
    """
    body = line.rstrip(b"\r\n")
    text = body[body.rfind(b"\r") + 1 :].decode("utf-8", "backslashreplace")
    shown = text[:limit]
    if not shown.isprintable():
        shown = "".join(char if _is_harmless(char) else _escaped(char) for char in shown)
    return shown if len(text) <= limit else f"{shown}… ({len(text) - limit} more characters)"


def _is_harmless(char: str) -> bool:
    return char.isprintable() or char == "\t" or unicodedata.category(char) == "Zs"


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


class LineIndex:
    """The byte offsets of the line ends of a growing file. A line counts when its newline is written.

    A file that became shorter or was replaced is indexed again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ends = array("Q")
        self._scanned = 0
        self._inode = -1

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def size(self) -> int:
        """Number of bytes in complete lines."""
        return self._ends[-1] if self._ends else 0

    def refresh(self, max_bytes: int = _MAX_STEP) -> int:
        """Index the added text, at most ``max_bytes`` in this call; return the number of new lines."""
        before = len(self._ends)
        try:
            with self.path.open("rb") as file:
                state = os.fstat(file.fileno())
                if state.st_ino != self._inode or state.st_size < self._scanned:
                    self._ends, self._scanned, self._inode, before = array("Q"), 0, state.st_ino, 0
                self._scan(file.fileno(), min(state.st_size, self._scanned + max_bytes))
        except OSError:
            return 0
        return len(self._ends) - before

    def _scan(self, descriptor: int, stop: int) -> None:
        while self._scanned < stop:
            data = os.pread(descriptor, min(_CHUNK, stop - self._scanned), self._scanned)
            if not data:
                return
            found = data.find(b"\n")
            while found >= 0:
                self._ends.append(self._scanned + found + 1)
                found = data.find(b"\n", found + 1)
            self._scanned += len(data)

    def read(self, start: int, stop: int, limit: int = 4 * SHOWN_CHARACTERS) -> list[bytes]:
        """Return the lines ``start`` to ``stop`` (not included), at most ``limit`` bytes of each."""
        lines = []
        with self.path.open("rb") as file:
            for number in range(max(start, 0), min(stop, len(self._ends))):
                begin = self._ends[number - 1] if number else 0
                length = self._ends[number] - begin - 1
                lines.append(os.pread(file.fileno(), min(length, limit), begin))
        return lines


@dataclass
class LogTail:
    """Follows a log over its parts; ``read`` returns the complete lines that were added since the last call.

    Attributes:
        first: Path of the first part of the log.
        lost: Number of parts that were deleted before they were read.
    """

    first: Path
    lost: int = 0
    _part: int = 0
    _offset: int = 0

    @classmethod
    def at_end(cls, first: Path) -> LogTail:
        """Return a tail at the current end of the log."""
        tail = cls(first)
        parts = log_parts(first)
        if parts:
            tail._part = _number(parts[-1])
            tail._offset = _end_of_lines(parts[-1])
        return tail

    def parts_read(self) -> list[tuple[Path, int]]:
        """Return the parts before this position, each with the number of bytes before it."""
        parts = [part for part in log_parts(self.first) if _number(part) <= self._part]
        return [(part, self._offset if _number(part) == self._part else _end_of_lines(part)) for part in parts]

    def read(self) -> list[bytes]:
        """Return the new lines, without their newlines."""
        lines: list[bytes] = []
        for part in log_parts(self.first):
            number = _number(part)
            if number < self._part:
                continue
            if number > self._part:
                self.lost += number - self._part - 1
                self._part, self._offset = number, 0
            lines += self._read_part(part)
        return lines

    def _read_part(self, path: Path) -> list[bytes]:
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:
                    self._offset = 0
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        end = data.rfind(b"\n") + 1
        self._offset += end
        return data[:end].split(b"\n")[:-1]


def _number(part: Path) -> int:
    tail = part.name.rpartition(".")[2]
    return int(tail) if tail.isdigit() else 0


def _end_of_lines(path: Path) -> int:
    """Return the end of the last complete line of a file; the file is read backwards from its end."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            while end > 0:
                begin = max(end - _CHUNK, 0)
                found = os.pread(file.fileno(), end - begin, begin).rfind(b"\n")
                if found >= 0:
                    return begin + found + 1
                end = begin
    except OSError:  # the part was deleted meanwhile
        pass
    return 0


def last_lines(until: LogTail, count: int) -> list[bytes]:
    """Return the last lines before the position of a tail; only the end of the log is read."""
    found: list[bytes] = []
    for part, end in reversed(until.parts_read()):
        if len(found) >= count:
            break
        try:
            found = _last_of_file(part, end, count - len(found)) + found
        except OSError:  # the part was deleted meanwhile
            continue
    return found


def _last_of_file(path: Path, end: int, count: int) -> list[bytes]:
    begin, newlines = end, 0
    blocks: list[bytes] = []
    with path.open("rb") as file:
        while begin > 0 and newlines <= count:
            length = min(_CHUNK, begin)
            begin -= length
            blocks.append(os.pread(file.fileno(), length, begin))
            newlines += blocks[-1].count(b"\n")
    lines = b"".join(reversed(blocks)).split(b"\n")[:-1]
    return lines[-count:]


def all_lines(until: LogTail) -> Iterator[bytes]:
    """Yield every line before the position of a tail, the oldest first, with one line in memory."""
    for part, end in until.parts_read():
        try:
            with part.open("rb") as file:
                while file.tell() < end:
                    yield file.readline().removesuffix(b"\n")
        except OSError:  # the part was deleted meanwhile
            continue


def errors_only(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines about errors: each complete traceback, and lines with the name of an error."""
    in_traceback = False
    for line in lines:
        if line.startswith("Traceback (most recent call last)"):
            in_traceback = True
            yield line
        elif in_traceback and _INDENTED.match(line):
            yield line
        elif in_traceback or _ERROR.match(line):
            in_traceback = False  # the last line of a traceback has the name of the exception
            yield line


@dataclass(frozen=True)
class SourceLine:
    """A line with the name of its log."""

    source: str
    text: str


def merge_by_time(logs: Sequence[tuple[str, Iterable[str]]]) -> Iterator[SourceLine]:
    """Merge the lines of several logs by the time at the beginning of each line.

    A line without a time has the time of the line before it. Lines of equal time keep the order of the logs.

    Args:
        logs: (name, lines) of each log, its lines in their own order.
    """
    streams = (_timed(index, name, lines) for index, (name, lines) in enumerate(logs))
    for _, _, _, line in heapq.merge(*streams, key=lambda item: item[:3]):
        yield line


def _timed(index: int, name: str, lines: Iterable[str]) -> Iterator[tuple[float, int, int, SourceLine]]:
    time = 0.0
    for number, line in enumerate(lines):
        found = line_time(line)
        time = time if found is None else max(time, found)  # a log keeps its own order
        yield time, index, number, SourceLine(name, line)


def line_time(line: str) -> float | None:
    """Return the time near the beginning of a line as seconds since 1970, or None."""
    match = _TIME.search(line, 0, 64)
    if match is None:
        return None
    try:
        return datetime.fromisoformat(match.group().replace(",", ".")).timestamp()
    except ValueError:  # digits that are not a date
        return None
