"""Adds deltas to the weights of a model as torch parametrizations, and finds them again."""

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
from lightning_hub.methods.osft.fused import output_dim, sizes
from lightning_hub.methods.osft.subspace import trained_rank
from lightning_hub.methods.osft.weight_delta import FusedDelta, SingleDelta, WeightDelta, ZeroDelta
from lightning_hub.methods.targets import WeightMatrix, reject_tied_weights

RATIO_OPTION = "model.init_args.unfreeze_rank_ratio"

THIN = 1.6
"""Cost of a multiplication in a product with a thin matrix, relative to one of wide matrices. Measured on a CPU for
weights from 128 x 512 to 2048 x 768 and packed rows from 512 to 4,096 tokens: there both forwards take equal time."""

NumReserved: TypeAlias = Callable[[str, Sequence[int] | None], int]
"""Returns the number of directions that previous tasks use of a weight, by name and shape; None for any shape."""

Parametrization = Literal["delta", "usv"]


@dataclass(frozen=True)
class DeltaConfig:
    """The settings of the deltas of a model.

    Attributes:
        ratio: Share of the singular directions that may be trained.
        complement: See ``ExactDelta``.
        forward: How a layer applies its delta; auto uses what costs less for each weight.
        parametrization: ``delta`` is the exact form, ``usv`` the published one.
        fused: Whether a fused layer is one weight, or one weight for each part.
        row_tokens: Tokens of a packed row, from which auto decides; None for very many.
        is_rounded: Whether deltas are computed in bfloat16.
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
            raise ConfigError(
                f"unfreeze_rank_ratio is {self.ratio}", where=RATIO_OPTION, remedy="use a number from 0 to 1"
            )
        if self.parametrization == "usv" and self.complement == "thin":
            raise ConfigError(
                "complement thin cannot be used with parametrization usv",
                where="model.init_args.complement",
                remedy="use complement full, or parametrization delta",
            )


@dataclass(frozen=True)
class ParametrizedWeight:
    """A weight with a delta.

    Attributes:
        matrix: The weight.
        delta: Its delta.
        holder: The module of torch that has both.
    """

    matrix: WeightMatrix
    delta: WeightDelta
    holder: parametrize.ParametrizationList

    @property
    def original(self) -> nn.Parameter:
        """The frozen weight ``W0`` without its delta, as it is stored."""
        return cast("nn.Parameter", self.holder.original)

    def pieces(self, weight: Tensor | None = None) -> Iterator[tuple[str, str, SingleDelta, Tensor]]:
        """Yield for each part: its name, the prefix of its parameters in the delta, its delta, its slice of ``weight``.

        Args:
            weight: A tensor of the shape of the weight; the frozen weight if None.
        """
        found = list(self.delta.pieces(self.original if weight is None else weight))
        for index, (prefix, piece, part) in enumerate(found):
            yield piece_name(self.matrix, index, len(found)), prefix, piece, part


def piece_name(matrix: WeightMatrix, index: int, count: int) -> str:
    """Return the name of a part of a weight: the name of the weight if it has only one part."""
    return matrix.full_name if count == 1 else f"{matrix.full_name}.{index}"


def inject_deltas(
    model: PreTrainedModel,
    targets: Sequence[WeightMatrix],
    config: DeltaConfig,
    ratios: Callable[[WeightMatrix], float] | None = None,
    num_reserved: NumReserved = lambda name, shape: 0,
) -> None:
    """Freeze the targets and add a delta to each that has trained directions.

    It uses the parametrizations of torch: every kind of layer reads ``W0 + dW`` as its weight. Its class, its forward
    and its other parameters do not change.

    Args:
        model: The model; it may be on the meta device.
        targets: Weights of the model.
        config: The settings of the deltas.
        ratios: Gives the ratio of each weight, if they differ.
        num_reserved: Gives the number of directions that previous tasks use of a weight.

    Raises:
        ConfigError: A target shares its weight with another layer, or previous tasks use all of its directions.
    """
    reject_tied_weights(targets, remedy="remove it from targets")
    for matrix in targets:
        module = model.get_submodule(matrix.module)
        weight = cast("nn.Parameter", getattr(module, matrix.parameter))
        weight.requires_grad_(False)
        delta = _delta_of(model, matrix, config, ratios(matrix) if ratios else config.ratio, num_reserved)
        if not delta.trained():
            continue
        parametrize.register_parametrization(module, matrix.parameter, delta.to(weight.device), unsafe=True)
        if isinstance(module, nn.Linear | Conv1D) and _is_factored(delta, matrix, config):
            delta.forward_as = "factored"
            module.register_forward_hook(delta.add_to_output)


def _delta_of(
    model: PreTrainedModel, matrix: WeightMatrix, config: DeltaConfig, ratio: float, num_reserved: NumReserved
) -> WeightDelta:
    """Return the delta of one weight, or of its parts."""
    *experts, out, into = matrix.shape
    dim = output_dim(model, matrix)
    lengths = sizes(model, matrix) if config.fused == "parts" else [matrix.shape[dim]]
    dtype = model.get_parameter(matrix.full_name).dtype
    count = len(lengths)
    if num_reserved(matrix.full_name if count > 1 else piece_name(matrix, 0, 2), None):
        raise ConfigError(
            f"a previous task has trained {matrix.name} as {'one weight' if count > 1 else 'several weights'}",
            where="model.init_args.fused",
            remedy=f"set fused to {'whole' if count > 1 else 'parts'}",
        )
    parts: list[SingleDelta] = []
    for index, length in enumerate(lengths):
        shape = (length, into) if dim == -2 else (out, length)
        name = piece_name(matrix, index, count)
        used = num_reserved(name, (*experts, *shape))
        is_left = trained_rank(ratio, min(shape)) > used
        if used and not is_left:
            raise ConfigError(
                f"previous tasks use {used} directions of {name}, and ratio {ratio} allows no more",
                where="model.init_args.previous",
                remedy="raise unfreeze_rank_ratio" if ratio < 1 else "remove it from targets: it has no direction left",
            )
        if not is_left:
            parts.append(ZeroDelta(shape))
        elif config.parametrization == "usv":
            parts.append(UsvDelta(shape, ratio, dtype, *experts))
        else:
            number = experts[0] if experts else None
            parts.append(ExactDelta(shape, ratio, config.complement, dtype, number, used, is_rounded=config.is_rounded))
    delta = parts[0] if count == 1 else FusedDelta(parts, lengths, dim)
    delta.output_dim = dim
    return delta


def _is_factored(delta: WeightDelta, matrix: WeightMatrix, config: DeltaConfig) -> bool:
    """Return whether a layer applies its delta as two factors, beside its frozen weight."""
    found = [(piece, part.shape) for _, piece, part in delta.pieces(torch.empty(matrix.shape, device="meta"))]
    if config.forward == "merged" or not all(piece.protected for piece, _ in found):
        return False
    if config.forward == "factored":
        return True
    merged, factored = zip(*(_products(piece, shape, config.row_tokens) for piece, shape in found), strict=True)
    return config.parametrization == "delta" and THIN * sum(factored) < sum(merged)


def _products(piece: SingleDelta, shape: Sequence[int], tokens: int | None) -> tuple[float, float]:
    """Return the relative number of multiplications for each token with a merged delta, and with a factored one.

    Merged, the delta is computed once, and every token adds to a dense gradient; two products give the gradient of the
    trained tensor. Factored, each token goes through both factors in the forward and the backward, and adds to the
    gradient of one of them.
    """
    out, into = shape
    build = 2 * piece.rank / tokens if tokens else 0.0
    return out * into * (1 + build), piece.rank * (2 * (out + into) + max(out, into))


def parametrized_weights(model: nn.Module, targets: Sequence[WeightMatrix]) -> Iterator[ParametrizedWeight]:
    """Yield the weights with a delta, in the order of the targets."""
    for matrix in targets:
        module = model.get_submodule(matrix.module)
        if parametrize.is_parametrized(module, matrix.parameter):
            holder = cast("nn.ModuleDict", module.parametrizations)[matrix.parameter]
            assert isinstance(holder, parametrize.ParametrizationList)
            delta = holder[0]
            assert isinstance(delta, WeightDelta)
            yield ParametrizedWeight(matrix, delta, holder)


@contextmanager
def cached_weights(found: Sequence[ParametrizedWeight]) -> Iterator[None]:
    """Compute each weight with its delta only once in this context; nothing may train in it.

    Sharded weights are not cached.
    """
    if any(isinstance(parametrized.original, DTensor) for parametrized in found):
        yield  # else each rank would have the full model in memory
        return
    forwards = [parametrized.delta.forward_as for parametrized in found]
    try:
        for parametrized in found:
            parametrized.delta.forward_as = "merged"
        with parametrize.cached():
            yield
    finally:
        for parametrized, forward in zip(found, forwards, strict=True):
            parametrized.delta.forward_as = forward


def merged_name(name: str) -> str | None:
    """Return the name of a weight in the model without deltas; None for a tensor of a delta.

    Args:
        name: A name in the state dict of a model with deltas.
    """
    head, found, tail = name.partition(".parametrizations.")
    if not found:
        return name
    parameter, _, rest = tail.partition(".")
    dotted = f"{head}.{parameter}"
    return dotted if rest == "original" else None
