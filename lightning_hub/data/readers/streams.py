"""Files as streams of decompressed bytes; a damaged file is not mistaken for one that ends."""

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
"""The most blocks of the largest line size that are read to find the end of a line."""

_ZSTD_CHUNK = 2_048
"""Compressed bytes read at a time. 4 bytes can unpack to 128 KiB: this limits what one call unpacks."""

BROKEN_STREAM = (EOFError, OSError, zlib.error, zstandard.ZstdError)
"""Errors that a damaged stream raises."""


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
    """The frames of a file, one after the other; the library's own reader accepts a file that is cut off."""

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
    """Numbered lines as bytes; instead of a line that cannot be used, a text that says why.

    A damaged stream ends with such a text. A line over the limit is skipped. If its end is not found, the rest of the
    file is skipped too.
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
                    yield number, "the end of this line was not found; the rest of the file is not read"
                    return
    except BROKEN_STREAM as error:
        yield number + 1, f"the file is damaged or cut off ({error})"


def _skip_line(stream: BinaryIO, max_bytes: int) -> bool:
    """Read to the end of a line; False if it is not found."""
    for _ in range(_SKIPPED_LINES):
        line = stream.readline(max_bytes)
        if not line or line.endswith(b"\n"):
            return True
    return False
