"""The terminal of a process that trains. It may be closed at any time, and the training goes on."""

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

_NOBODY_READS = {errno.EPIPE, errno.EIO, errno.EBADF}
"""What is raised where the reader or the terminal is gone: there is nobody to be told."""


class ConnectionLostError(HubError):
    """Another process of this run has closed a connection."""

    kind = "comm"


class TerminalStream:
    """A text stream that never raises. Once it cannot be written, what is written to it goes nowhere.

    Everything else is the stream's own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_open = True

    def write(self, text: str) -> int:
        """Write, as long as that is possible."""
        if self._is_open:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:  # the terminal knows fewer characters than the text has
                self.write(text.encode("ascii", "backslashreplace").decode())
            except (OSError, ValueError) as error:  # ValueError: somebody has closed the stream
                self._let_go(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each line."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, as long as that is possible."""
        if self._is_open:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._let_go(error)

    def _let_go(self, error: Exception) -> None:
        """Lead what is still to come, at the end of the process too, to nowhere."""
        self._is_open = False
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        if isinstance(error, OSError) and error.errno not in _NOBODY_READS:
            name = getattr(self._stream, "name", "a stream")
            print_to_terminal(f"warning: {name} cannot be written ({error.strerror}); the logs of the run go on\n")

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def terminal() -> TextIO:
    """Return standard error past any log, for what is drawn; it never raises."""
    stream = sys.__stderr__ if sys.__stderr__ is not None else io.StringIO()
    return cast(TextIO, TerminalStream(stream))


def print_to_terminal(text: str) -> None:
    """Write to standard error past any log, if there is anybody."""
    if sys.__stderr__ is not None:
        with suppress(OSError, ValueError):
            sys.__stderr__.write(text)
            sys.__stderr__.flush()


@contextmanager
def independent_of_terminal() -> Iterator[None]:
    """Let the terminal go while it lasts: no broken stream and no hangup ends the work.

    Raises:
        ConnectionLostError: A pipe broke that is none of the terminal's; the command line takes a BrokenPipeError
            for a reader who has seen enough.
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
            stream.flush()  # what fails later, at the end of the process, would change its exit code
        sys.stdout, sys.stderr = streams
        if is_main:
            signal.signal(signal.SIGHUP, hangup)


def open_missing_streams() -> None:
    """Open standard streams that were closed by whoever started this process.

    Else the next files that are opened would take their numbers, and what libraries print would go into them.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # in a locale that knows few characters
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
