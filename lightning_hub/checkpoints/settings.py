"""The ``checkpoint`` section of a recipe: when the state of a run is saved, and how much of it is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from lightning_hub.config.bounds import Bounds, check_bounds


@dataclass(frozen=True)
class Best:
    """Which checkpoints are kept for their metric.

    Args:
        metric: Name of a logged metric.
        mode: Whether lower or higher is better.
        keep: How many of the best are kept.
    """

    metric: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    keep: Annotated[int, Bounds(">= 1")] = 1


@dataclass(frozen=True)
class CheckpointSettings:
    """When the state of the run is saved, and how much of it is kept.

    Args:
        every_n_steps: Save after every so many optimizer steps; not by steps if null.
        every_n_epochs: Save at the end of every so many epochs; not by epochs if null.
        every_minutes: Save when so many minutes have passed since the last save; not by time if null.
        keep: How many of the newest checkpoints are kept, at least 2: a run must survive a damaged one.
        best: Keep the best by a metric as well; none if null.
        asynchronous: Copy the state to host memory and write it while training goes on.
    """

    every_n_steps: Annotated[int, Bounds(">= 1")] | None = None
    every_n_epochs: Annotated[int, Bounds(">= 1")] | None = 1
    every_minutes: Annotated[float, Bounds("> 0")] | None = None
    keep: Annotated[int, Bounds(">= 2")] = 2
    best: Best | None = None
    asynchronous: bool = False

    def __post_init__(self) -> None:
        """Refuse values outside the bounds."""
        check_bounds(CheckpointSettings.__init__, vars(self), "checkpoint")
