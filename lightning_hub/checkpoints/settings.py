"""The ``checkpoint`` section of a recipe: when checkpoints are saved, and which are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from lightning_hub.config.bounds import Bounds, check_bounds


@dataclass(frozen=True)
class Best:
    """Which checkpoints are kept because of a metric.

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
    """When checkpoints are saved, and which are kept.

    Args:
        every_n_steps: Save each time after this number of optimizer steps; null for not by steps.
        every_n_epochs: Save each time at the end of this number of epochs; null for not by epochs.
        every_minutes: Save when this number of minutes has passed since the last save; null for not by time.
        keep: How many of the newest checkpoints are kept, at least 2, because one can be damaged.
        best: Keep the best checkpoints by a metric as well; null for none.
        asynchronous: Copy the state to host memory, and write it while training continues.
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
