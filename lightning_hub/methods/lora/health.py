"""Adapters that do not learn: told by name after the second step, or when the run is saved."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hub.errors import HubError
from lightning_hub.parallel.agreement import any_rank
from lightning_hub.parallel.parts import own_part

LEAST_RATE = 1e-8
"""Learning rates up to this one may leave float32 weights where they are: their steps prove nothing."""

NAMED = 4
"""How many weights an error names."""


class DeadAdapterError(HubError):
    """Some adapters do not learn."""

    kind = "dead_adapter"

    def __init__(self, what: str, names: list[str], of: int) -> None:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        super().__init__(
            f"{len(names)} of {of} trained weights {what}: {', '.join(names[:NAMED])}{more}",
            remedy="this is a fault of the program or of a class added to it, not of the recipe",
        )


class Pulse:
    """Watches the first steps of a training, and what trains at each save.

    ``B`` starts at zero, so the gradient of ``A`` is zero in the first step, and that is no fault: all ``B`` must have
    moved after one step, everything else after two. Steps with a learning rate near 0, as a warm-up begins with,
    do not count. Experts are left out, because no token of a step may reach one.

    Args:
        model: The model, with its adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.model = model
        self.steps = 0
        self._alive = [False] * len(self.names)
        self._before: list[Tensor] | None = None

    def check(self, optimizers: Iterable[Optimizer]) -> None:
        """Refuse weights that are not trained any more.

        Raises:
            DeadAdapterError: One wants no gradient, or no optimizer has it.
        """
        held = {id(one) for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]}
        found = dict(self.model.named_parameters())
        frozen = [name for name in self.names if not found[name].requires_grad]
        if frozen:
            raise DeadAdapterError("are frozen by now", frozen, len(self.names))
        missing = [name for name in self.names if id(found[name]) not in held]
        if missing:
            raise DeadAdapterError("are in no optimizer", missing, len(self.names))

    def before_step(self, optimizer: Optimizer) -> None:
        """Remember the weights, if the step of an optimizer that comes now proves something."""
        rate = max(group["lr"] for group in optimizer.param_groups)
        if self.steps < 2 and rate > LEAST_RATE:
            self._before = [own_part(one.detach()).clone() for one in self._weights()]

    def after_step(self, *, counts: bool) -> None:
        """Compare the weights with what they were.

        Args:
            counts: Whether anything could be learnt from the step.

        Raises:
            DeadAdapterError: Some had no gradient, or did not move.
        """
        before, self._before = self._before, None
        if before is None or not counts:
            return
        self.steps += 1
        moved = [not torch.equal(own_part(one.detach()), old) for one, old in zip(self._weights(), before, strict=True)]
        self._alive = [a or b for a, b in zip(self._alive, any_rank(moved), strict=True)]
        dead = [
            name
            for name, alive in zip(self.names, self._alive, strict=True)
            if not alive and "expert" not in name and (self.steps > 1 or ".lora_B." in name)
        ]
        if dead:
            raise DeadAdapterError(f"have not moved in {self.steps} steps", dead, len(self.names))

    def _weights(self) -> list[nn.Parameter]:
        found = dict(self.model.named_parameters())
        return [found[name] for name in self.names]
