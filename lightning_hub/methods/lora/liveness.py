"""Adapters that do not learn: told by name after the second step, or when the run is saved."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hub.errors import HubError
from lightning_hub.parallel.collectives import all_reduce_any
from lightning_hub.parallel.dtensor import local_tensor

MIN_LEARNING_RATE = 1e-8
"""Learning rates up to this one may leave float32 weights where they are: their steps prove nothing."""

MAX_NAMED_WEIGHTS = 4
"""How many weights an error names."""


class DeadAdapterError(HubError):
    """Some adapters do not learn."""

    kind = "dead_adapter"

    def __init__(self, what: str, names: list[str], of: int) -> None:
        more = f" and {len(names) - MAX_NAMED_WEIGHTS} more" if len(names) > MAX_NAMED_WEIGHTS else ""
        super().__init__(
            f"{len(names)} of {of} trained weights {what}: {', '.join(names[:MAX_NAMED_WEIGHTS])}{more}",
            remedy="this is a fault of the program or of a class added to it, not of the recipe",
        )


def group_of(name: str) -> str:
    """Return the name under which a weight is judged: experts in modules of their own count as one."""
    return re.sub(r"(experts?)\.\d+\.", r"\1.*.", name)


class AdapterUpdateCheck:
    """Watches the first steps of a training, and what trains at each save.

    ``B`` starts at zero, so the gradient of ``A`` is zero in the first step, and that is no fault: all ``B`` must have
    moved after one step, everything else after two. Steps with a learning rate near 0, as a warm-up begins with,
    do not count.

    Experts get no gradient in a step whose tokens go to others, so they are judged together: one matrix for each in a
    single tensor, or in a module of its own. Some expert has tokens in every step, so the ``B`` of some expert moves in
    the first one. ``A`` has a gradient where tokens come to an expert for the second time, which is so in the step
    after as many steps as there are experts, however tokens are dealt out.

    Args:
        model: The model, with its adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.model = model
        self.steps = 0
        members = Counter(map(group_of, self.names))
        self._patience = {name: max(members[group_of(name)], _num_experts(model, name)) for name in self.names}
        self._waiting = list(self.names)
        self._before: dict[str, Tensor] | None = None

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
        """Remember the weights that have not moved yet, if the step of an optimizer that comes now proves something."""
        rate = max(group["lr"] for group in optimizer.param_groups)
        if self._waiting and rate > MIN_LEARNING_RATE:
            self._before = {name: local_tensor(one.detach()).clone() for name, one in self._weights().items()}

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
        moved = [not torch.equal(local_tensor(one.detach()), before[name]) for name, one in self._weights().items()]
        alive = {group_of(name) for name, moves in zip(self._waiting, all_reduce_any(moved), strict=True) if moves}
        self._waiting = [name for name in self._waiting if group_of(name) not in alive]
        dead = [name for name in self._waiting if ".lora_B." in name or self.steps > self._patience[name]]
        if dead:
            raise DeadAdapterError(f"have not moved in {self.steps} steps", dead, len(self.names))

    def _weights(self) -> Mapping[str, nn.Parameter]:
        found = dict(self.model.named_parameters())
        return {name: found[name] for name in self._waiting}


def _num_experts(model: nn.Module, name: str) -> int:
    """Return how many experts a weight holds."""
    layer = model.get_submodule(name.partition(".lora_")[0]) if ".lora_" in name else None
    return layer.num_experts if isinstance(layer, ParamWrapper) else 1
