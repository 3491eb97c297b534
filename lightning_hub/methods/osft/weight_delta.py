"""The base classes of deltas: a delta is added to a frozen weight, as a parametrization of torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_hub.methods.osft.subspace import SubspaceSplit

Factors: TypeAlias = tuple[Tensor, Tensor | None]
"""Two matrices whose product is a delta, ``(out, r)`` and ``(r, in)``; or the dense delta and None."""

Forward = Literal["merged", "factored"]


class WeightDelta(nn.Module, ABC):
    """A delta of a weight. Where it is 0, the weight is bit-identical to the frozen one.

    Attributes:
        forward_as: ``merged`` adds the delta to the weight, ``factored`` adds its product to the output of the layer.
        output_dim: The dim of the outputs in the stored weight: -2, or -1 if it is stored as (in, out).
    """

    forward_as: Forward = "merged"
    output_dim: int = -2

    @abstractmethod
    def pieces(self, weight: Tensor) -> Iterator[tuple[str, SingleDelta, Tensor]]:
        """Yield for each part with its own decomposition: its prefix in this module, its delta, and its weight.

        Args:
            weight: The weight as it is stored, or a tensor of its shape.
        """

    @abstractmethod
    def join(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """Concatenate tensors of the pieces, along a dim of the weight or of the output of the layer."""

    @abstractmethod
    def plan(self) -> str:
        """Return what the bases depend on beside the weight; a part of the cache key."""

    def trained(self) -> list[nn.Parameter]:
        """Return the trained parameters."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def dense(self, weight: Tensor) -> Tensor:
        """Return the dense delta, float32, with the shape of the weight."""
        return self.join([product(piece.factors(part)) for _, piece, part in self.pieces(weight)], self.output_dim)

    def leaks(self, weight: Tensor, change: Tensor) -> tuple[float, float]:
        """Return the share of ``change`` in protected columns, and in protected rows: the largest of all parts.

        Args:
            weight: ``W0`` as it is stored.
            change: Any change of the weight, for example a delta after rounding.
        """
        parts = (part for _, _, part in self.pieces(change))
        both = [piece.leak(own, part) for (_, piece, own), part in zip(self.pieces(weight), parts, strict=True)]
        return max(left for left, _ in both), max(right for _, right in both)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight that the layer uses, in the dtype of the frozen weight."""
        if self.forward_as == "factored":
            return weight
        with torch.autocast(weight.device.type, enabled=False):
            return (weight + self.dense(weight)).to(weight.dtype)

    def add_to_output(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return the output of a layer with the delta: ``y + (x right^T) left^T``. A forward hook of the layer.

        The dense delta and its dense gradient are not computed.
        """
        if self.forward_as == "merged":
            return output
        weight = cast("Tensor", layer.parametrizations["weight"].original)  # type: ignore[index, union-attr]
        (inputs,) = args
        parts = []
        for _, piece, part in self.pieces(weight):
            with torch.autocast(weight.device.type, enabled=False):
                left, right = piece.factors(part)
            assert right is not None, "where everything trains, the delta is merged"
            first, second = (left, right) if self.output_dim == -1 else (right.mT, left.mT)
            parts.append((inputs @ first.to(inputs.dtype)) @ second.to(inputs.dtype))
        return output + self.join(parts, -1).to(output.dtype)

    @abstractmethod
    def begin(self) -> None:
        """Set the delta to 0; called when the bases are set."""

    @abstractmethod
    def project_gradients(self) -> None:
        """Remove the protected directions from the gradients; called before clipping."""

    @abstractmethod
    def project(self) -> None:
        """Remove the protected directions from the trained parameters; called after each step of the optimizer."""


class SingleDelta(WeightDelta):
    """A delta with one decomposition: of a weight, of the weight of each expert, or of a part of a fused weight.

    Attributes:
        rank: How many directions train.
        protected: How many are protected.
        num_reserved: Trainable directions that the deltas of previous tasks use; they are protected.
        kept: A basis in a buffer, for weights that cannot give it accurately.
    """

    rank: int
    protected: int
    num_reserved: int = 0
    kept: Tensor | None

    @abstractmethod
    def factors(self, weight: Tensor) -> Factors:
        """Return the factors of the delta, float32."""

    @abstractmethod
    def leak(self, weight: Tensor, change: Tensor) -> tuple[float, float]:
        """Return the share of the norm of ``change`` in the protected columns, and in the protected rows (0 to 1)."""

    @property
    @abstractmethod
    def basis_names(self) -> list[str]:
        """The names of the stored bases."""

    @abstractmethod
    def bases_of(self, split: SubspaceSplit) -> dict[str, Tensor]:
        """Return the stored bases of a split by name, in float64."""

    def needs_stored_basis(self, split: SubspaceSplit) -> bool:
        """Return whether the protected directions of the longer side must be stored in ``kept``."""
        return False

    def begin(self) -> None:
        """Do nothing: the trained parameters are zero at the start."""

    def project_gradients(self) -> None:
        """Do nothing: a gradient cannot leave the allowed subspace."""

    def project(self) -> None:
        """Do nothing: the delta cannot leave the allowed subspace."""

    def pieces(self, weight: Tensor) -> Iterator[tuple[str, SingleDelta, Tensor]]:
        """Yield itself."""
        yield "", self, weight

    def join(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """Return the only part."""
        (part,) = parts
        return part


class ZeroDelta(SingleDelta):
    """A delta of zero, for a part of a fused weight without trained directions; it has no tensors to shard.

    Args:
        shape: Shape of the part as it is stored, without the dim of experts.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.rank, self.protected = 0, min(shape)
        self.register_buffer("kept", None)

    def factors(self, weight: Tensor) -> Factors:
        """Return two factors of rank 0."""
        *rows, columns = weight.shape
        left, right = (*rows, 0), (*rows[:-1], 0, columns)
        return weight.new_zeros(left, dtype=torch.float32), weight.new_zeros(right, dtype=torch.float32)

    def leak(self, weight: Tensor, change: Tensor) -> tuple[float, float]:
        """Return 1 for both sides, or 0 for a change of zero: all directions are protected."""
        share = float(change.any())
        return share, share

    @property
    def basis_names(self) -> list[str]:
        """There are none."""
        return []

    def bases_of(self, split: SubspaceSplit) -> dict[str, Tensor]:
        """Return an empty dict."""
        return {}

    def plan(self) -> str:
        """Return the cache key of a part that does not train."""
        return "0"


class FusedDelta(WeightDelta):
    """The delta of a fused layer, such as ``qkv_proj``: each part has its own delta.

    Args:
        parts: The deltas of the parts, in the order of their outputs.
        sizes: The number of outputs of each part.
        output_dim: The dim of the outputs in the stored weight.
    """

    def __init__(self, parts: Sequence[SingleDelta], sizes: Sequence[int], output_dim: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.sizes = list(sizes)
        self.output_dim = output_dim

    def pieces(self, weight: Tensor) -> Iterator[tuple[str, SingleDelta, Tensor]]:
        """Yield the parts."""
        slices = weight.split(self.sizes, self.output_dim)
        for index, (part, own) in enumerate(zip(self._parts(), slices, strict=True)):
            yield f"parts.{index}.", part, own

    def join(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """Concatenate the tensors of the parts."""
        return torch.cat(list(parts), dim)

    def plan(self) -> str:
        """Return the plans of the parts."""
        each = (part.plan() for part in self._parts())
        return f"{self.output_dim} " + " ".join(f"{size} {plan}" for size, plan in zip(self.sizes, each, strict=True))

    def begin(self) -> None:
        """Set the deltas of the parts to 0."""
        for part in self._parts():
            part.begin()

    def project_gradients(self) -> None:
        """Project the gradients of the parts."""
        for part in self._parts():
            part.project_gradients()

    def project(self) -> None:
        """Project the parts."""
        for part in self._parts():
            part.project()

    def _parts(self) -> Iterator[SingleDelta]:
        return (cast("SingleDelta", part) for part in self.parts)


def product(factors: Factors) -> Tensor:
    """Return the dense delta of two factors, or of one."""
    left, right = factors
    return left if right is None else left @ right


def whole_gradient(tensor: Tensor) -> Tensor:
    """Return the tensor in a form in which its gradient is all-reduced over its replicas, not a partial sum on each."""
    return tensor.redistribute(placements=tensor.placements) if isinstance(tensor, DTensor) else tensor
