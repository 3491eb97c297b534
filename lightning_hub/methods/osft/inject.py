"""Puts changes under the weights of a model, and takes the weights with their changes out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_hub.errors import ConfigError
from lightning_hub.methods.osft.delta_exact import Complement, ExactDelta
from lightning_hub.methods.osft.delta_usv import UsvDelta
from lightning_hub.methods.osft.fused import output_axis, sizes
from lightning_hub.methods.osft.subspace import trained_rank
from lightning_hub.methods.osft.weight_delta import FusedDelta, SingleDelta, WeightDelta, ZeroDelta
from lightning_hub.methods.targets import WeightMatrix, reject_tied_weights

RATIO_OPTION = "model.init_args.unfreeze_rank_ratio"

THIN = 1.6
"""What a multiplication costs in a product of a thin matrix, where it costs 1 in one of wide ones. Measured on a CPU
for weights from 128 x 512 to 2048 x 768 and rows from 512 to 4,096 tokens: there the two ways about meet."""

NumReserved: TypeAlias = Callable[[str, Sequence[int] | None], int]
"""How many directions earlier tasks have taken of the weight of a name; of any shape if that is None."""

Parametrization = Literal["delta", "usv"]


@dataclass(frozen=True)
class DeltaConfig:
    """What the changes of a model look like.

    Attributes:
        ratio: Share of the singular directions that may be trained.
        complement: See ``ExactDelta``.
        forward: How a layer applies its change; auto takes what costs less for each weight.
        parametrization: ``delta`` is the exact form, ``usv`` the published one.
        fused: Whether layers that do the work of several count as one weight, or as one for each part.
        row_tokens: Tokens of a row, by which auto decides; as many as there may be if None.
        is_rounded: Whether changes are computed in bfloat16.
    """

    ratio: float
    complement: Complement = "full"
    forward: Literal["auto", "merged", "factored"] = "auto"
    parametrization: Parametrization = "delta"
    fused: Literal["parts", "whole"] = "parts"
    row_tokens: int | None = None
    is_rounded: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio <= 1.0:
            raise ConfigError(f"unfreeze_rank_ratio is {self.ratio}", where=RATIO_OPTION, remedy="use 0 to 1")
        if self.parametrization == "usv" and self.complement == "thin":
            raise ConfigError(
                "complement thin does not go with the published form",
                where="model.init_args.complement",
                remedy="use delta",
            )


@dataclass(frozen=True)
class ParametrizedWeight:
    """A weight that has a change.

    Attributes:
        matrix: Which one.
        change: Its change.
        holder: The module that holds both.
    """

    matrix: WeightMatrix
    change: WeightDelta
    holder: parametrize.ParametrizationList

    @property
    def original(self) -> nn.Parameter:
        """The weight without its change, as it is stored."""
        return cast("nn.Parameter", self.holder.original)

    def pieces(self, weight: Tensor | None = None) -> Iterator[tuple[str, str, SingleDelta, Tensor]]:
        """Yield the pieces of the change: name of its weight, where it lies in the change, itself, its part.

        Args:
            weight: What it takes a part of; the weight itself if None.
        """
        found = list(self.change.pieces(self.original if weight is None else weight))
        for place, (path, piece, part) in enumerate(found):
            yield piece_name(self.matrix, place, len(found)), path, piece, part


def piece_name(matrix: WeightMatrix, place: int, count: int) -> str:
    """Return the name of a part of a weight: the weight's own where there is one part only."""
    return matrix.full_name if count == 1 else f"{matrix.full_name}.{place}"


def inject_deltas(
    model: PreTrainedModel,
    targets: Sequence[WeightMatrix],
    form: DeltaConfig,
    ratios: Callable[[WeightMatrix], float] | None = None,
    num_reserved: NumReserved = lambda name, shape: 0,
) -> None:
    """Freeze the targets and put a change under each that trains anything.

    torch's own parametrizations do it: a layer finds ``W0 + dW`` where it looks for its weight, whatever kind of layer
    it is, and its class, its forward and its other parameters stay as they are.

    Args:
        model: With or without memory.
        targets: Weights of the model.
        form: Of the changes.
        ratios: Gives the ratio of each weight, where they differ.
        num_reserved: Tells how many directions of a weight, by its name and shape, earlier tasks have taken.

    Raises:
        ConfigError: A target shares its weight with another layer, or nothing of it is left to train.
    """
    reject_tied_weights(targets, remedy="leave it out")
    for matrix in targets:
        module = model.get_submodule(matrix.module)
        weight = cast("nn.Parameter", getattr(module, matrix.parameter))
        weight.requires_grad_(False)
        change = _delta_of(model, matrix, form, ratios(matrix) if ratios else form.ratio, num_reserved)
        if not change.trained():
            continue
        parametrize.register_parametrization(module, matrix.parameter, change.to(weight.device), unsafe=True)
        if isinstance(module, nn.Linear | Conv1D) and _is_factored(change, matrix, form):
            change.forward_as = "factored"
            module.register_forward_hook(change.add_to_output)


def _delta_of(
    model: PreTrainedModel, matrix: WeightMatrix, form: DeltaConfig, ratio: float, taken: NumReserved
) -> WeightDelta:
    """Return the change of one weight, or of its parts."""
    *experts, out, into = matrix.shape
    axis = output_axis(model, matrix)
    lengths = sizes(model, matrix) if form.fused == "parts" else [matrix.shape[axis]]
    dtype = model.get_parameter(matrix.full_name).dtype
    count = len(lengths)
    if taken(matrix.full_name if count > 1 else piece_name(matrix, 0, 2), None):
        raise ConfigError(
            f"an earlier task has changed {matrix.name} as {'one weight' if count > 1 else 'several'}",
            where="model.init_args.fused",
            remedy=f"set {'whole' if count > 1 else 'parts'}",
        )
    parts: list[SingleDelta] = []
    for place, length in enumerate(lengths):
        shape = (length, into) if axis == -2 else (out, length)
        name = piece_name(matrix, place, count)
        used = taken(name, (*experts, *shape))
        is_left = trained_rank(ratio, min(shape)) > used
        if used and not is_left:
            raise ConfigError(
                f"earlier tasks have taken {used} directions of {name}, all that ratio {ratio} frees",
                where="model.init_args.previous",
                remedy="raise unfreeze_rank_ratio" if ratio < 1 else "leave it out of targets: nothing of it is left",
            )
        if not is_left:
            parts.append(ZeroDelta(shape))
        elif form.parametrization == "usv":
            parts.append(UsvDelta(shape, ratio, dtype, *experts))
        else:
            number = experts[0] if experts else None
            parts.append(ExactDelta(shape, ratio, form.complement, dtype, number, used, is_rounded=form.is_rounded))
    change = parts[0] if count == 1 else FusedDelta(parts, lengths, axis)
    change.axis = axis
    return change


def _is_factored(change: WeightDelta, matrix: WeightMatrix, form: DeltaConfig) -> bool:
    """Decide how a layer applies its change."""
    found = [(piece, part.shape) for _, piece, part in change.pieces(torch.empty(matrix.shape, device="meta"))]
    if form.forward == "merged" or not all(piece.protected for piece, _ in found):
        return False
    if form.forward == "factored":
        return True
    merged, factored = zip(*(_products(piece, shape, form.row_tokens) for piece, shape in found), strict=True)
    return form.parametrization == "delta" and THIN * sum(factored) < sum(merged)


def _products(piece: SingleDelta, shape: Sequence[int], tokens: int | None) -> tuple[float, float]:
    """Return the multiplications of a row that a change takes when it is merged, and when it is not; relative ones.

    Merged, the change is built, and every token adds to a dense gradient, which two products bring back to what
    trains. Factored, each token goes through both factors forth and back, and adds to the gradient of one of them.
    """
    out, into = shape
    build = 2 * piece.rank / tokens if tokens else 0.0
    return out * into * (1 + build), piece.rank * (2 * (out + into) + max(out, into))


def parametrized_weights(model: nn.Module, targets: Sequence[WeightMatrix]) -> Iterator[ParametrizedWeight]:
    """Yield the weights that have a change, in the model's order."""
    for matrix in targets:
        module = model.get_submodule(matrix.module)
        if parametrize.is_parametrized(module, matrix.parameter):
            holder = cast("nn.ModuleDict", module.parametrizations)[matrix.parameter]
            assert isinstance(holder, parametrize.ParametrizationList)
            change = holder[0]
            assert isinstance(change, WeightDelta)
            yield ParametrizedWeight(matrix, change, holder)


@contextmanager
def cached_weights(found: Sequence[ParametrizedWeight]) -> Iterator[None]:
    """Keep the weights with their changes for a while, where this process has all of them: nothing may train then."""
    if any(isinstance(site.original, DTensor) for site in found):
        yield  # a rank of several would hold the whole model
        return
    ways = [site.change.forward_as for site in found]
    try:
        for site in found:
            site.change.forward_as = "merged"
        with parametrize.cached():
            yield
    finally:
        for site, way in zip(found, ways, strict=True):
            site.change.forward_as = way


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
