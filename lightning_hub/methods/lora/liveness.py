"""Finds adapters that do not train, and names them: after the first steps, and at each save."""

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
"""Steps with a learning rate up to this one may not change a float32 weight, so they are not counted."""

MAX_NAMED_WEIGHTS = 4
"""How many weights an error names."""


class DeadAdapterError(HubError):
    """Some adapters do not learn."""

    kind = "dead_adapter"

    def __init__(self, what: str, names: list[str], of: int) -> None:
        more = f" and {len(names) - MAX_NAMED_WEIGHTS} more" if len(names) > MAX_NAMED_WEIGHTS else ""
        super().__init__(
            f"{len(names)} of {of} trained weights {what}: {', '.join(names[:MAX_NAMED_WEIGHTS])}{more}",
            remedy="this is a fault of the program or of a class added to it, not of the recipe: report it",
        )


def group_of(name: str) -> str:
    """Return the name under which a weight is checked: experts that are separate modules count as one."""
    return re.sub(r"(experts?)\.\d+\.", r"\1.*.", name)


class AdapterUpdateCheck:
    """Checks that all adapters change in the first steps, and at each save that all are still trained.

    ``B`` starts at zero, so the gradient of ``A`` is zero in the first step, and that is not an error. Every ``B`` must
    have changed after one step, everything else after two. Steps with a learning rate near 0, as at the beginning of a
    warmup, do not count.

    An expert gets no gradient in a step that routes no token to it, so the experts of a layer are checked together,
    whether they are one tensor or separate modules. Some expert has tokens in every step, so the ``B`` of some expert
    changes in the first one. ``A`` has a gradient when an expert gets tokens for the second time. With ``n`` experts
    this happens at the latest in step ``n + 1``, for any routing.

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
        """Check that all weights are still trained.

        Raises:
            DeadAdapterError: A weight does not require a gradient, or is not in an optimizer.
        """
        optimized = {id(one) for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]}
        found = dict(self.model.named_parameters())
        frozen = [name for name in self.names if not found[name].requires_grad]
        if frozen:
            raise DeadAdapterError("are now frozen", frozen, len(self.names))
        missing = [name for name in self.names if id(found[name]) not in optimized]
        if missing:
            raise DeadAdapterError("are in no optimizer", missing, len(self.names))

    def before_step(self, optimizer: Optimizer) -> None:
        """Copy the weights that have not changed yet, if the learning rate of the next step is large enough."""
        rate = max(group["lr"] for group in optimizer.param_groups)
        if self._waiting and rate > MIN_LEARNING_RATE:
            self._before = {name: local_tensor(one.detach()).clone() for name, one in self._weights().items()}

    def after_step(self, *, counts: bool) -> None:
        """Compare the weights with their copies from before the step.

        Args:
            counts: Whether the step had trained tokens and was not skipped.

        Raises:
            DeadAdapterError: Some weights had no gradient, or did not change.
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
            raise DeadAdapterError(f"have not changed in {self.steps} steps", dead, len(self.names))

    def _weights(self) -> Mapping[str, nn.Parameter]:
        found = dict(self.model.named_parameters())
        return {name: found[name] for name in self._waiting}


def _num_experts(model: nn.Module, name: str) -> int:
    """Return the number of experts in one weight; 1 for a weight without experts."""
    layer = model.get_submodule(name.partition(".lora_")[0]) if ".lora_" in name else None
    return layer.num_experts if isinstance(layer, ParamWrapper) else 1
