"""Files as streams of bytes, decompressed, with damage told apart from the end."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

COMPRESSED = (".gz", ".zst")
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
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            chunk = self._frame.unused_data or self._file.read(1 << 17)
            if not chunk:
                if self._inside:
                    raise EOFError("the compressed stream ends in a frame")
                return 0
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = self._frame.decompress(chunk)
            self._inside = not self._frame.eof
        taken, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)

    def close(self) -> None:
        self._file.close()
        super().close()


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes | str]]:
    """Numbered lines as bytes; a damaged stream ends in one numbered text that says what happened."""
    number = 0
    try:
        with open_stream(path) as stream:
            for line in stream:
                number += 1
                yield number, line
    except BROKEN_STREAM as error:
        yield number + 1, f"the file is damaged or cut off ({error})"
