"""A progress bar that is drawn on the terminal directly, so that it is not in the logs."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TimeRemainingColumn

from lightning_hub.runs.terminal import terminal

SECONDS_BETWEEN_LINES = 10.0
"""How often a line is printed where there is no terminal to draw on."""


class ProgressBar:
    """A bar with a description, its columns and the time left; nothing is drawn where there is no terminal.

    Args:
        description: What is in progress.
        total: The amount at the end; None if it is not known.
        columns: What is shown beside the bar; ``{task.fields[numbers]}`` is the text that each update gives.
        completed: The amount at the beginning.
        stays: Whether the bar stays on the terminal when it has ended.
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
        """Draw an amount, and the text of the field ``numbers``."""
        self._bar.update(self._task, completed=completed, numbers=numbers)

    def stop(self) -> None:
        """Draw the bar for the last time."""
        if self.is_drawn:
            self._bar.stop()
