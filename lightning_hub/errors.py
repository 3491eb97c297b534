"""One family of errors for what a person can mend: what was given, where, and what to do.

Anything else that is raised is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command (the contract of the run folder)."""

    DONE = 0
    FAILED = 1
    WRONG_INPUT = 2
    PREFLIGHT = 3
    NO_CHECKPOINT = 4
    STOPPED = 75
    HARD_STOP = 130


class HubError(Exception):
    """An error that is said in one sentence, without a traceback.

    Args:
        message: What was given and why it cannot be used.
        where: The place: ``file:line``, a config key, a flag or a rank.
        remedy: What to do about it.
    """

    exit_code: ExitCode = ExitCode.FAILED
    kind: str = "internal"
    """The ``class`` of an ``error.json``: config, data, oom, nan, comm, disk, signal or internal."""
    label: str = "error"
    """The word before the sentence on standard error."""

    def __init__(self, message: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.remedy = remedy

    def __reduce__(self) -> tuple[object, ...]:
        """Let every kind travel between processes as it is, whatever its own ``__init__`` asks for."""
        return _made_again, (type(self), self.args), vars(self)

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}; {self.remedy}" if self.remedy else text


def _made_again(kind: type[HubError], args: tuple[object, ...]) -> HubError:
    return kind.__new__(kind, *args)


class ConfigError(HubError):
    """A recipe, a flag or an argument is wrong: nothing was started."""

    exit_code = ExitCode.WRONG_INPUT
    kind = "config"


class DataError(HubError):
    """The input data cannot be trained on as asked."""

    exit_code = ExitCode.WRONG_INPUT
    kind = "data"


class NoCheckpointError(HubError):
    """A resume was asked for and no usable checkpoint exists."""

    exit_code = ExitCode.NO_CHECKPOINT
    kind = "config"


DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE}


def is_disk_trouble(error: BaseException) -> bool:
    """Say whether an error tells of a disk that is full, read-only or broken; some libraries say it only in words."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return True
    return "No space left on device" in str(error) or "Disk quota exceeded" in str(error)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says; its class if it says nothing, as Python's own MemoryError."""
    return (str(error).splitlines() or [type(error).__name__])[0]
