"""A line before a command does what takes seconds, so that nobody looks at an empty screen."""

from __future__ import annotations

import sys


def notice(text: str) -> None:
    """Say on standard error what a slow command does now; standard output stays what programs read."""
    if sys.stderr is None:  # closed by whoever started this process
        return
    try:
        print(f"{text} ...", file=sys.stderr, flush=True)
    except OSError:  # the terminal is gone, and the command goes on
        return


LOADING = "loading torch and the model"
