"""A progress bar that is drawn on the terminal and not on stdout, so that it is not written to a log."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TimeRemainingColumn

from lightning_hub.runs.terminal import terminal

SECONDS_BETWEEN_LINES = 10.0
"""How often a line is printed when there is no terminal, in seconds."""


class ProgressBar:
    """A bar with a description, its columns and the remaining time; without a terminal nothing is drawn.

    Args:
        description: What is in progress.
        total: The amount at the end; None if it is not known.
        columns: More columns beside the bar; ``{task.fields[numbers]}`` is the text of the last update.
        completed: The amount at the start.
        stays: Whether the bar stays on the terminal after the end.
    """

    def __init__(
        self, description: str, total: float | None, *columns: ProgressColumn, completed: int = 0, stays: bool = True
    ) -> None:
        console = Console(file=terminal())
        self.is_drawn = console.is_terminal
        self._bar = Progress(
            "{task.description}",
            BarColumn(),
            *columns,
            TimeRemainingColumn(compact=True),
            console=console,
            refresh_per_second=5,
            transient=not stays,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task(description, total=total, completed=completed, numbers="")
        if self.is_drawn:
            self._bar.start()

    def update(self, completed: float, numbers: str = "") -> None:
        """Set the finished amount, and the text of the field ``numbers``."""
        self._bar.update(self._task, completed=completed, numbers=numbers)

    def stop(self) -> None:
        """Stop drawing the bar."""
        if self.is_drawn:
            self._bar.stop()
