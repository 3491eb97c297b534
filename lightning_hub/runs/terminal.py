"""The terminal of a training process. It can be closed at any time, and the training continues."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO, cast

from lightning_hub.errors import HubError

_CLOSED_ERRORS = {errno.EPIPE, errno.EIO, errno.EBADF}
"""Errors of a closed pipe or terminal. They are not reported, because there is no reader."""


class ConnectionLostError(HubError):
    """Another process of this run has closed a connection."""

    kind = "comm"


class TerminalStream:
    """A text stream that never raises. After an error of writing, all later text is dropped.

    Other attributes are those of the stream.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_open = True

    def write(self, text: str) -> int:
        """Write, if the stream can still be written."""
        if self._is_open:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:  # the encoding of the terminal does not have a character
                self.write(text.encode("ascii", "backslashreplace").decode())
            except (OSError, ValueError) as error:  # ValueError: the stream is closed
                self._redirect_to_devnull(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each line."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, if the stream can still be written."""
        if self._is_open:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._redirect_to_devnull(error)

    def _redirect_to_devnull(self, error: Exception) -> None:
        """Send all later output to ``/dev/null``, also the last flush at the end of the process."""
        self._is_open = False
        with suppress(OSError, ValueError):
            devnull = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            os.dup2(devnull, self._stream.fileno())
            os.close(devnull)
        if isinstance(error, OSError) and error.errno not in _CLOSED_ERRORS:
            name = getattr(self._stream, "name", "a stream")
            print_to_terminal(f"warning: {name} cannot be written ({error.strerror}); the logs of the run continue\n")

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def terminal() -> TextIO:
    """Return standard error without the log, for progress bars; it never raises."""
    stream = sys.__stderr__ if sys.__stderr__ is not None else io.StringIO()
    return cast(TextIO, TerminalStream(stream))


def print_to_terminal(text: str) -> None:
    """Write to standard error without the log, if it is open."""
    if sys.__stderr__ is not None:
        with suppress(OSError, ValueError):
            sys.__stderr__.write(text)
            sys.__stderr__.flush()


@contextmanager
def independent_of_terminal() -> Iterator[None]:
    """Inside this context, a closed terminal does not end the work: stream errors and SIGHUP are ignored.

    Raises:
        ConnectionLostError: Another pipe broke. It replaces the BrokenPipeError, which the command line would take for
            a closed reader of its output.
    """
    streams = sys.stdout, sys.stderr
    shown = TerminalStream(streams[0]), TerminalStream(streams[1])
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in shown)
    is_main = threading.current_thread() is threading.main_thread()
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN) if is_main else None
    try:
        yield
    except BrokenPipeError as error:
        raise ConnectionLostError(f"another process of this run has closed a connection ({error})") from error
    finally:
        for stream in shown:
            stream.flush()  # an error at the end of the process would change its exit code
        sys.stdout, sys.stderr = streams
        if is_main:
            signal.signal(signal.SIGHUP, hangup)


def open_missing_streams() -> None:
    """Open standard streams that the parent process has closed.

    Otherwise the next opened files get their descriptors, and the output of libraries goes into these files.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for a locale with few characters
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            stream = os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
