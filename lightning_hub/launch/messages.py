"""Lines on standard error for the person who runs a command."""

from __future__ import annotations

import sys
from contextlib import suppress


def print_notice(text: str) -> None:
    """Say on standard error what a slow command does now; standard output stays what programs read."""
    if sys.stderr is None:  # closed by whoever started this process
        return
    try:
        print(f"{text} ...", file=sys.stderr, flush=True)
    except OSError:  # the terminal is gone, and the command goes on
        return


LOADING = "loading torch and the model"


def print_note(text: str) -> None:
    """Print a note for a person."""
    with suppress(BrokenPipeError):  # nobody reads notes: that ends no training
        print(f"note: {text}", file=sys.stderr)
