"""Atomic writes of small files, and files of complete lines. Only the owner can read them, with any umask."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

FILE_MODE = 0o600
FOLDER_MODE = 0o700

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


def make_private_folder(path: Path) -> None:
    """Make a folder and its missing parents; new folders are private to the owner."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        folder.chmod(FOLDER_MODE)


def write_atomic(path: Path, data: bytes, *, fsync: bool = False) -> None:
    """Replace a file through a temporary file, so that a reader sees the old content or the new, never a part.

    Args:
        path: The file; a symbolic link of that name is replaced, not followed.
        data: Its complete content.
        fsync: Wait until the content is on the disk, for files that must survive a crash of the machine.

    Raises:
        OSError: The disk is full, or the folder does not exist any more; the old content stays.
    """
    temp = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    descriptor = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, FILE_MODE)
            file.write(data)
            file.flush()
            if fsync:
                os.fsync(descriptor)
        temp.replace(path)
    except OSError:
        temp.unlink(missing_ok=True)
        raise
    if fsync:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot sync a folder; the rename itself is done
        pass
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Mapping[str, object], *, fsync: bool = False, indent: int | None = None) -> None:
    """Write a JSON object atomically; see ``write_atomic``."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    write_atomic(path, (text + "\n").encode("utf-8", "backslashreplace"), fsync=fsync)


def read_json(path: Path) -> dict[str, Json] | None:
    """Return the object in a file, or None if it is absent, cannot be read or is not a JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        return None
    return value if isinstance(value, dict) else None


def touch(path: Path) -> None:
    """Create an empty file if it does not exist (a request in ``control/``)."""
    os.close(open_append(path))


def open_append(path: Path) -> int:
    """Open a file for appending only; return its descriptor. A symbolic link is refused."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    os.fchmod(descriptor, FILE_MODE)
    return descriptor


class LineFile:
    """A file to which complete lines are appended, each in one write.

    A full disk or a killed process can leave an incomplete line at the end. Then a newline is written first, so that
    only the incomplete line is lost.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._torn = False

    def append(self, line: str) -> None:
        """Append one line (without its newline).

        Raises:
            OSError: The line could not be written completely.
        """
        if self._descriptor is None:
            self._descriptor = open_append(self.path)
            self._torn = _ends_torn(self.path)
        data = (("\n" if self._torn else "") + line + "\n").encode("utf-8", "backslashreplace")
        self._torn = True
        written = os.write(self._descriptor, data)
        if written != len(data):
            raise OSError(28, f"only {written} of {len(data)} bytes written", str(self.path))
        self._torn = False

    def close(self) -> None:
        """Close the file; a later append opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _ends_torn(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(-1, os.SEEK_END)
        return size > 0 and file.read(1) != b"\n"
