"""Puts changes under the weights of a model, and takes the weights with their changes out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from lightning_hub.errors import ConfigError
from lightning_hub.methods.osft.delta import Complement, Delta
from lightning_hub.methods.targets import Matrix

_PLACE = "model.init_args.targets"


@dataclass(frozen=True)
class Site:
    """A weight that has a change.

    Attributes:
        matrix: Which one.
        delta: Its change.
        holder: The module that holds both.
    """

    matrix: Matrix
    delta: Delta
    holder: parametrize.ParametrizationList

    @property
    def original(self) -> nn.Parameter:
        """The weight without its change, as it is stored."""
        return cast("nn.Parameter", self.holder.original)

    def merged(self) -> Tensor:
        """Return the weight with its change."""
        return cast("Tensor", self.holder())


def add_changes(
    model: PreTrainedModel,
    targets: Sequence[Matrix],
    ratio: float,
    complement: Complement,
    taken: Callable[[str], int] = lambda name: 0,
) -> None:
    """Freeze the targets and put a change under each that trains anything.

    torch's own parametrizations do it: a layer finds ``W0 + dW`` where it looks for its weight, whatever kind of layer
    it is, and its class, its forward and its other parameters stay as they are.

    Args:
        model: With or without memory.
        targets: Weights of the model.
        ratio: Share of the singular directions that may be trained.
        complement: See ``Delta``.
        taken: Tells how many directions of a weight earlier tasks have taken.

    Raises:
        ConfigError: A target is tied to another weight, which would change with it.
    """
    shared = _shared(model)
    for matrix in targets:
        module = model.get_submodule(matrix.module)
        weight = cast("nn.Parameter", getattr(module, matrix.parameter))
        if id(weight) in shared:
            raise ConfigError(
                f"{matrix.name} shares its weight with another layer, which would change with it",
                where=_PLACE,
                remedy="leave it out",
            )
        weight.requires_grad_(False)
        *experts, out, into = matrix.shape
        used = taken(matrix.full_name)
        delta = Delta((out, into), ratio, complement, weight.dtype, experts[0] if experts else None, used)
        if used and not delta.rank:
            raise ConfigError(
                f"earlier tasks have taken {used} directions of {matrix.name}, all that ratio {ratio} frees",
                where="model.init_args.previous",
                remedy="raise unfreeze_rank_ratio",
            )
        if delta.rank:
            parametrize.register_parametrization(module, matrix.parameter, delta.to(weight.device), unsafe=True)


def _shared(model: nn.Module) -> set[int]:
    """Return which parameters have more than one name."""
    seen: set[int] = set()
    twice: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice


def sites(model: nn.Module, targets: Sequence[Matrix]) -> Iterator[Site]:
    """Yield the weights that have a change, in the model's order."""
    for matrix in targets:
        module = model.get_submodule(matrix.module)
        if parametrize.is_parametrized(module, matrix.parameter):
            holder = cast("nn.ModuleDict", module.parametrizations)[matrix.parameter]
            assert isinstance(holder, parametrize.ParametrizationList)
            delta = holder[0]
            assert isinstance(delta, Delta)
            yield Site(matrix, delta, holder)


@torch.no_grad()
def merged_name(name: str) -> str | None:
    """Return the name that a weight has without its change; None for what belongs to the change.

    Args:
        name: A name in the state of a model with changes.
    """
    head, found, tail = name.partition(".parametrizations.")
    if not found:
        return name
    parameter, _, rest = tail.partition(".")
    dotted = f"{head}.{parameter}"
    return dotted if rest == "original" else None
