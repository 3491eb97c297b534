"""What is added to a frozen weight, as torch's parametrization of it: what all forms of a change have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_hub.methods.osft.subspace import SubspaceSplit

Factors: TypeAlias = tuple[Tensor, Tensor | None]
"""Two matrices whose product is a change, ``(out, r)`` and ``(r, in)``; where everything trains, the change alone."""

Forward = Literal["merged", "factored"]


class WeightDelta(nn.Module, ABC):
    """A change of a weight. Without one, the weight comes out bit by bit as it went in.

    Attributes:
        forward_as: ``merge_delta`` adds the change to the weight, ``factored`` its effect to what the layer gives.
        axis: Of the stored weight, along which the layer's outputs lie: -1 where it is stored as (in, out).
    """

    forward_as: Forward = "merged"
    axis: int = -2

    @abstractmethod
    def pieces(self, weight: Tensor) -> Iterator[tuple[str, SingleDelta, Tensor]]:
        """Yield each part that has a decomposition of its own: its prefix in this module, itself, its part of a weight.

        Args:
            weight: The whole weight as it is stored, or anything of its shape.
        """

    @abstractmethod
    def join(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        """Put what the pieces give together again, along an axis of the weight or of the layer's output."""

    @abstractmethod
    def plan(self) -> str:
        """Return what decides which bases it has, beside the weight: a part of the name under which they are kept."""

    def trained(self) -> list[nn.Parameter]:
        """Return what the optimizer moves."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def change(self, weight: Tensor) -> Tensor:
        """Return the change of the weight, in the dtype of what is trained: float32."""
        return self.join([product(piece.factors(part)) for _, piece, part in self.pieces(weight)], self.axis)

    def leaks(self, weight: Tensor, change: Tensor) -> tuple[float, float]:
        """Return the largest share of any change that lies in protected columns, and in protected rows.

        Args:
            weight: ``W0`` as it is stored.
            change: For example what is left of a change after rounding.
        """
        parts = (part for _, _, part in self.pieces(change))
        both = [piece.leak(own, part) for (_, piece, own), part in zip(self.pieces(weight), parts, strict=True)]
        return max(left for left, _ in both), max(right for _, right in both)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight that the layer works with, in the weight's dtype."""
        if self.forward_as == "factored":
            return weight
        with torch.autocast(weight.device.type, enabled=False):
            return (weight + self.change(weight)).to(weight.dtype)

    def add_to_output(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return what a layer gives with the change: ``y + (x right^T) left^T``. A forward hook of the layer.

        The dense change, and with it a dense gradient, is never made.
        """
        if self.forward_as == "merged":
            return output
        weight = cast("Tensor", layer.parametrizations["weight"].original)  # type: ignore[index, union-attr]
        (given,) = args
        parts = []
        for _, piece, part in self.pieces(weight):
            with torch.autocast(weight.device.type, enabled=False):
                left, right = piece.factors(part)
            assert right is not None, "where everything trains, the change is merged"
            first, second = (left, right) if self.axis == -1 else (right.mT, left.mT)
            parts.append((given @ first.to(given.dtype)) @ second.to(given.dtype))
        return output + self.join(parts, -1).to(output.dtype)

    @abstractmethod
    def begin(self) -> None:
        """Start at no change; called when the bases are there."""

    @abstractmethod
    def project_gradients(self) -> None:
        """Take out of the gradients what must not be learnt; called before clipping."""

    @abstractmethod
    def project(self) -> None:
        """Take out of what is trained what must not be learnt; called after each step of the optimizer."""


class SingleDelta(WeightDelta):
    """A change with one decomposition: of a weight, of each expert's, or of a part of a fused weight.

    Attributes:
        rank: How many directions train.
        protected: How many are protected.
        taken: Directions that earlier tasks have taken of those that would be trained.
        kept: A basis beside the parameters, for weights that cannot give it themselves.
    """

    rank: int
    protected: int
    taken: int = 0
    kept: Tensor | None

    @abstractmethod
    def factors(self, weight: Tensor) -> Factors:
        """Return the factors of the change."""

    @abstractmethod
    def leak(self, weight: Tensor, change: Tensor) -> tuple[float, float]:
        """Return the share of any change of the weight that lies in its protected columns, and in its rows."""

    @property
    @abstractmethod
    def basis_names(self) -> list[str]:
        """The names of what is kept of the split."""

    @abstractmethod
    def bases_of(self, split: SubspaceSplit) -> dict[str, Tensor]:
        """Return from the split of a weight what is kept of it, by name, in float64."""

    def needs_kept(self, split: SubspaceSplit) -> bool:
        """Say whether the protected directions of the longer side are needed beside the parameters."""
        return False

    def begin(self) -> None:
        """Do nothing: what trains starts at zero."""

    def project_gradients(self) -> None:
        """Do nothing: every gradient is allowed."""

    def project(self) -> None:
        """Do nothing: nothing can leave what is allowed."""

    def pieces(self, weight: Tensor) -> Iterator[tuple[str, SingleDelta, Tensor]]:
        """Yield itself."""
        yield "", self, weight

    def join(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        """Return the only part."""
        (part,) = parts
        return part


class ZeroDelta(SingleDelta):
    """No change, of a part of a fused weight for which no direction is left: it has no tensors that could be cut.

    Args:
        shape: Of the part as it is stored, without experts.
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
        """Return that all of any change lies in protected directions."""
        share = float(change.any())
        return share, share

    @property
    def basis_names(self) -> list[str]:
        """There are none."""
        return []

    def bases_of(self, split: SubspaceSplit) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def plan(self) -> str:
        """Return that nothing trains."""
        return "0"


class FusedDelta(WeightDelta):
    """The change of a layer that does the work of several, such as ``qkv_proj``: each of these is a weight of its own.

    Args:
        parts: Their changes, in the order of their outputs.
        sizes: How many outputs each has.
        axis: Of the outputs in the stored weight.
    """

    def __init__(self, parts: Sequence[SingleDelta], sizes: Sequence[int], axis: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.sizes = list(sizes)
        self.axis = axis

    def pieces(self, weight: Tensor) -> Iterator[tuple[str, SingleDelta, Tensor]]:
        """Yield the parts."""
        slices = weight.split(self.sizes, self.axis)
        for place, (part, own) in enumerate(zip(self._parts(), slices, strict=True)):
            yield f"parts.{place}.", part, own

    def join(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        """Return the parts side by side."""
        return torch.cat(list(parts), axis)

    def plan(self) -> str:
        """Return the plans of the parts."""
        each = (part.plan() for part in self._parts())
        return f"{self.axis} " + " ".join(f"{size} {plan}" for size, plan in zip(self.sizes, each, strict=True))

    def begin(self) -> None:
        """Let the parts begin."""
        for part in self._parts():
            part.begin()

    def project_gradients(self) -> None:
        """Project those of the parts."""
        for part in self._parts():
            part.project_gradients()

    def project(self) -> None:
        """Project the parts."""
        for part in self._parts():
            part.project()

    def _parts(self) -> Iterator[SingleDelta]:
        return (cast("SingleDelta", part) for part in self.parts)


def product(factors: Factors) -> Tensor:
    """Return the change that two factors, or one, make."""
    left, right = factors
    return left if right is None else left @ right


def whole_gradient(tensor: Tensor) -> Tensor:
    """Return a tensor whose gradient arrives summed over the ranks that hold it, not as one term on each."""
    return tensor.redistribute(placements=tensor.placements) if isinstance(tensor, DTensor) else tensor
