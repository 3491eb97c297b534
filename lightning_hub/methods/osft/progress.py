"""The progress of the decompositions: a bar on a terminal, else a line every ten seconds; nothing if all are cached."""

from __future__ import annotations

import time
from types import TracebackType

from rich.progress import TaskProgressColumn

from lightning_hub.progress_bar import SECONDS_BETWEEN_LINES, ProgressBar

DESCRIPTION = "decomposing weights"


class DecompositionProgress:
    """Shows how much of the work of this rank is finished; the bar appears after the first decomposition.

    Args:
        is_shown: Whether this rank shows anything: one rank is enough, because all have about equal work.
    """

    def __init__(self, is_shown: bool) -> None:
        self.is_shown = is_shown
        self._bar: ProgressBar | None = None
        self._printed_at = time.monotonic()

    def __enter__(self) -> DecompositionProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def done(self, share: float) -> None:
        """Show the finished share of the work, 0 to 1."""
        if not self.is_shown:
            return
        if self._bar is None:
            self._bar = ProgressBar(DESCRIPTION, 1.0, TaskProgressColumn(), stays=False)
        if self._bar.is_drawn:
            self._bar.update(share)
        elif time.monotonic() - self._printed_at >= SECONDS_BETWEEN_LINES:
            self._printed_at = time.monotonic()
            print(f"osft   {DESCRIPTION}: {share:.0%}", flush=True)
