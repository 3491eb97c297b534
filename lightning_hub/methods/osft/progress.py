"""How far the decompositions are: a bar on a terminal, a line now and then elsewhere, nothing where none is needed."""

from __future__ import annotations

import time
from types import TracebackType

from rich.progress import TaskProgressColumn

from lightning_hub.progress_bar import SECONDS_BETWEEN_LINES, ProgressBar

WORDS = "decomposing weights"


class DecompositionProgress:
    """Tells how much of this rank's work is done, from its first piece on.

    Args:
        speaks: Whether this rank tells anything; ranks have about equal shares.
    """

    def __init__(self, speaks: bool) -> None:
        self.speaks = speaks
        self._bar: ProgressBar | None = None
        self._said = time.monotonic()

    def __enter__(self) -> DecompositionProgress:
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
        if self._bar is None:
            self._bar = ProgressBar(WORDS, 1.0, TaskProgressColumn(), stays=False)
        if self._bar.is_drawn:
            self._bar.update(share)
        elif time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            print(f"osft   {WORDS}: {share:.0%}", flush=True)
