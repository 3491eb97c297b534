"""The errors that a user can fix. Each says what was given, where, and what to do.

Every other exception is a fault of this program and keeps its traceback.
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
    """An error that is printed as one message, without a traceback.

    Args:
        message: What was given and why it cannot be used.
        where: Where it was given: ``file:line``, a config key, a flag or a rank.
        remedy: What to do about it.
    """

    exit_code: ExitCode = ExitCode.FAILED
    kind: str = "internal"
    """The ``class`` of an ``error.json``: config, data, oom, nan, comm, disk, signal or internal."""
    label: str = "error"
    """The word before the message on standard error."""

    def __init__(self, message: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.remedy = remedy

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the error without a call of ``__init__``: subclasses have different arguments."""
        return _rebuild, (type(self), self.args), vars(self)

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}; {self.remedy}" if self.remedy else text


def _rebuild(kind: type[HubError], args: tuple[object, ...]) -> HubError:
    return kind.__new__(kind, *args)


class ConfigError(HubError):
    """A recipe, a flag or an argument is wrong: nothing was started."""

    exit_code = ExitCode.WRONG_INPUT
    kind = "config"


class DataError(HubError):
    """The input data cannot be used for this training."""

    exit_code = ExitCode.WRONG_INPUT
    kind = "data"


class NoCheckpointError(HubError):
    """A resume was requested, but there is no usable checkpoint."""

    exit_code = ExitCode.NO_CHECKPOINT
    kind = "config"


DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE}


def is_disk_trouble(error: BaseException) -> bool:
    """Return whether an error is about a full, read-only or broken disk; some libraries say so only in the message."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return True
    return "No space left on device" in str(error) or "Disk quota exceeded" in str(error)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty (MemoryError)."""
    return (str(error).splitlines() or [type(error).__name__])[0]
