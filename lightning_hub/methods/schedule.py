"""Learning-rate schedules: the factor of the learning rate as a function of the finished steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_hub.errors import ConfigError

ScheduleName = Literal["constant", "linear", "cosine", "wsd"]

DECAY_SHARE = 0.1
"""The share of the steps in which ``wsd`` (warmup-stable-decay) falls (MiniCPM, Hu et al. 2024, section 4.3)."""


@dataclass(frozen=True)
class Schedule:
    """The factor of the learning rate, between 0 and 1, for each step; same meaning as in transformers.

    Attributes:
        shape: ``constant``, ``linear``, ``cosine``, or ``wsd`` (warm up, stay, then fall linearly).
        warmup_steps: Steps in which the factor rises linearly from 0.
        total_steps: Steps of the complete run; only ``constant`` allows infinity.
        min_ratio: The factor at the end.
    """

    shape: ScheduleName
    warmup_steps: int
    total_steps: float
    min_ratio: float

    def __post_init__(self) -> None:
        if self.shape != "constant" and math.isinf(self.total_steps):
            raise ConfigError(
                f"lr_scheduler {self.shape} needs the number of steps, and this run has no last step",
                where="model.init_args.lr_scheduler",
                remedy="set trainer.max_steps or trainer.max_epochs, or use constant",
            )

    def __call__(self, step: int) -> float:
        """Return the factor for the step that follows ``step`` finished ones."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.shape == "constant":
            return 1.0
        start = self.warmup_steps
        if self.shape == "wsd":
            start = max(start, int(self.total_steps * (1 - DECAY_SHARE)))
        progress = min(1.0, max(0.0, (step - start) / max(1, self.total_steps - start)))
        height = 0.5 * (1 + math.cos(math.pi * progress)) if self.shape == "cosine" else 1 - progress
        return self.min_ratio + (1 - self.min_ratio) * height
