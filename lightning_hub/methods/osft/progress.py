"""How far the decompositions are: a bar on a terminal, a line now and then elsewhere, nothing where none is needed."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from lightning_hub.runs.terminal import terminal

SECONDS_BETWEEN_LINES = 10.0

WORDS = "decomposing weights"


class Progressing:
    """Tells how much of this rank's work is done, from its first piece on.

    Args:
        speaks: Whether this rank tells anything; ranks have about equal shares.
    """

    def __init__(self, speaks: bool) -> None:
        self.speaks = speaks
        self._console = Console(file=terminal())  # the terminal itself: a bar does not belong in a log
        self._bar: Progress | None = None
        self._said = time.monotonic()

    def __enter__(self) -> Progressing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def done(self, share: float) -> None:
        """Tell that this share of the work is behind, 0 to 1."""
        if not self.speaks:
            return
        if self._console.is_terminal:
            self._draw(share)
        elif time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            print(f"osft   {WORDS}: {share:.0%}", flush=True)

    def _draw(self, share: float) -> None:
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(compact=True), console=self._console, transient=True,
                                 redirect_stdout=False, redirect_stderr=False)  # fmt: skip
            self._bar.add_task(WORDS, total=1.0)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=share)
