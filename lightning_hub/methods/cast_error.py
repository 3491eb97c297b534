"""What a cast of the weights does to what a method has changed in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGE = 0.1
"""Share of a change that a cast may lose without a word about it."""


@dataclass
class CastError:
    """What becomes of a change when the weights that carry it are cast.

    Attributes:
        dtype: What they are cast to.
        changed: How many numbers are changed.
        kept: How many of them differ from the base's after the cast.
        change: Sum of the squares of the change.
        lost: Sum of the squares of what the cast has done to it.
    """

    dtype: torch.dtype
    changed: int = 0
    kept: int = 0
    change: float = 0.0
    lost: float = 0.0

    def add(self, base: Tensor, change: Tensor, end: Tensor) -> Tensor:
        """Count one weight, and return what is left of its change.

        Args:
            base: The weight as it was.
            change: What was learnt, float32.
            end: The weight with its change, not rounded to another dtype before.
        """
        cast = end.to(self.dtype)
        left = cast.float() - base.float()
        self.changed += int((change != 0).sum())
        self.kept += int(((change != 0) & (cast != base.to(self.dtype))).sum())
        self.change += float(change.square().sum())
        self.lost += float((left - change).square().sum())
        return left

    def describe(self) -> str:
        """Return a line for a person."""
        share = self.kept / max(1, self.changed)
        error = (self.lost / self.change) ** 0.5 if self.change else 0.0
        name = str(self.dtype).removeprefix("torch.")
        hint = "; --dtype float32 keeps it" if error > LARGE else ""
        return (
            f"in {name} {share:.1%} of the changed numbers differ from the base's, and the change is off by "
            f"{error:.1%}{hint}"
        )
