"""Lines on standard error for the person who runs a command."""

from __future__ import annotations

import sys
from contextlib import suppress


def print_notice(text: str) -> None:
    """Print on standard error what a slow command does now; standard output is for programs."""
    if sys.stderr is None:  # the process was started with standard error closed
        return
    try:
        print(f"{text} ...", file=sys.stderr, flush=True)
    except OSError:  # the terminal was closed; the command continues
        return


LOADING = "loading torch and the model"


def print_note(text: str) -> None:
    """Print a note for a person."""
    with suppress(BrokenPipeError):  # the reader has ended; training continues
        print(f"note: {text}", file=sys.stderr)
