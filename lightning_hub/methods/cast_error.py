"""Measures how much of a trained weight change is lost when the weights are cast to another dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGE = 0.1
"""Relative error of a change (Frobenius norm) above which the report recommends float32."""


@dataclass
class CastError:
    """The error of a weight change after the changed weights are cast, summed over weights.

    Attributes:
        dtype: The dtype after the cast.
        changed: The number of elements that training changed.
        kept: How many of them still differ from the base model after the cast.
        change: Sum of the squared change.
        lost: Sum of the squared difference between the change before and after the cast.
    """

    dtype: torch.dtype
    changed: int = 0
    kept: int = 0
    change: float = 0.0
    lost: float = 0.0

    def add(self, base: Tensor, change: Tensor, end: Tensor) -> Tensor:
        """Add one weight, and return its change after the cast (float32, shape of the weight).

        Args:
            base: The weight before training.
            change: The trained change, float32.
            end: The weight with its change, not yet cast.
        """
        cast = end.to(self.dtype)
        left = cast.float() - base.float()
        self.changed += int((change != 0).sum())
        self.kept += int(((change != 0) & (cast != base.to(self.dtype))).sum())
        self.change += float(change.square().sum())
        self.lost += float((left - change).square().sum())
        return left

    def describe(self) -> str:
        """Return one line of text: the share of elements that still differ, and the relative error."""
        share = self.kept / max(1, self.changed)
        error = (self.lost / self.change) ** 0.5 if self.change else 0.0
        name = str(self.dtype).removeprefix("torch.")
        hint = "; --dtype float32 keeps it" if error > LARGE else ""
        return (
            f"in {name} {share:.1%} of the changed numbers differ from the base's, and the change is off by "
            f"{error:.1%}{hint}"
        )
