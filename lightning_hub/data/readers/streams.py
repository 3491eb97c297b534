"""Files as streams of bytes, decompressed, with damage told apart from the end."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from lightning_hub.data.readers.limits import ExampleLimits

COMPRESSED = (".gz", ".zst")
_SKIPPED_LINES = 16
"""How many times the largest line is read in search of a line's end."""

_ZSTD_CHUNK = 2_048
"""Compressed bytes taken at a time. A block of 128 KiB can come from 4 bytes: this bounds what one call unpacks."""

BROKEN_STREAM = (EOFError, OSError, zlib.error, zstandard.ZstdError)
"""What reading a damaged stream raises."""


def open_stream(path: Path) -> BinaryIO:
    """Open a file, decompressed by its suffix."""
    match path.suffix.lower():
        case ".gz":
            return cast(BinaryIO, gzip.open(path, "rb"))
        case ".zst":
            return cast(BinaryIO, io.BufferedReader(_ZstdFrames(path), buffer_size=1 << 20))
        case _:
            return path.open("rb", buffering=1 << 20)


class _ZstdFrames(io.RawIOBase):
    """The frames of a file, one after the other; the library's own reader takes a cut file for a whole one."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._inside = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            chunk = self._frame.unused_data or self._file.read(_ZSTD_CHUNK)
            if not chunk:
                if self._inside:
                    raise EOFError("the compressed stream ends in a frame")
                return 0
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(chunk))
            self._inside = not self._frame.eof
        taken, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)

    def close(self) -> None:
        self._file.close()
        super().close()


def numbered_lines(path: Path, limits: ExampleLimits) -> Iterator[tuple[int, bytes | str]]:
    """Numbered lines as bytes; in place of one that cannot be given stands a text that says why.

    A damaged stream ends with such a text. A line over the limit is skipped, and after a great many bytes without a
    line end the rest of the file with it.
    """
    number = 0
    try:
        with open_stream(path) as stream:
            while line := stream.readline(limits.max_bytes + 1):
                number += 1
                if len(line) <= limits.max_bytes:
                    yield number, line
                    continue
                yield number, f"the line is {limits.too_large}"
                if not line.endswith(b"\n") and not _skip_line(stream, limits.max_bytes):
                    yield number, "the file is not read beyond this line, which does not end"
                    return
    except BROKEN_STREAM as error:
        yield number + 1, f"the file is damaged or cut off ({error})"


def _skip_line(stream: BinaryIO, max_bytes: int) -> bool:
    """Read on to the end of a line; False where none comes in sight."""
    for _ in range(_SKIPPED_LINES):
        line = stream.readline(max_bytes)
        if not line or line.endswith(b"\n"):
            return True
    return False
