"""The split of a weight into what is protected and what may be trained.

A weight ``W`` (out x in) with singular value decomposition ``U S V^T`` is protected along its ``k`` largest singular
directions; what may be trained lives in the span of the other ``r``. Only the two spans matter, so one eigenvalue
decomposition of the shorter side's Gram matrix gives them, and a QR decomposition carries them to the other side
(orthogonal subspace fine-tuning, arXiv 2504.07097, section 3; the route over Gram and QR keeps both sides orthonormal
to float64 rounding even where ``W`` lacks rank, where dividing by singular values does not).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from lightning_hub.errors import HubError

GRAM_TOLERANCE = 1e-10
"""Error of the split above which the slower, more accurate decomposition is used."""


class DecompositionError(HubError):
    """A weight cannot be decomposed."""

    kind = "nan"


@dataclass(frozen=True)
class SubspaceSplit:
    """Orthonormal directions of a weight, the protected ones first, in float64.

    Attributes:
        u: Left directions, shape ``(out, R)`` with ``R = min(out, in)``.
        v: Right directions, shape ``(R, in)``.
        values: The singular values, largest first, shape ``(R,)``.
        protected: How many directions ``k`` are protected; the other ``r = R - k`` may be trained.
        error: Bound of how far the two spans are from the exact ones, relative.
    """

    u: Tensor
    v: Tensor
    values: Tensor
    protected: int
    error: float

    @property
    def trainable(self) -> tuple[Tensor, Tensor, Tensor]:
        """The trained directions with their values: ``u`` (out, r), ``values`` (r,), ``v`` (r, in)."""
        return self.u[:, self.protected :], self.values[self.protected :], self.v[self.protected :]

    @property
    def long_side(self) -> Tensor:
        """The protected directions of the longer side."""
        return self.u[:, : self.protected] if self.u.shape[0] > self.v.shape[1] else self.v[: self.protected]

    @property
    def amplification(self) -> float:
        """How much more than the rounding of the right side leaks, when the weight carries it to the longer left one.

        An error of ``v_i`` comes back from ``W v_i / s_i`` times the weight's mean over ``s_i``, in each of the ``k``
        protected directions, beside a change that has ``long - k`` directions. The same holds mirrored.
        """
        high = self.values[: self.protected]
        if not len(high) or not high[-1]:
            return float("inf") if len(high) else 0.0
        free = max(self.u.shape[0], self.v.shape[1]) - self.protected
        spread = self.values.square().mean() * high.pow(-2).mean()
        return float((spread * 2 * self.protected / max(1, free)).sqrt())


def trained_rank(ratio: float, size: int) -> int:
    """Return how many of ``size`` directions train: the nearest integer to ``ratio * size``, halves upwards.

    The ratio is taken as it is written in decimal, so that rounding of floats moves nothing: 0.1 of 10 is 1.
    """
    return int(Fraction(str(ratio)) * size + Fraction(1, 2))


def split_subspace(weight: Tensor, rank: int, name: str = "weight") -> SubspaceSplit:
    """Split a weight so that its ``rank`` smallest singular directions may be trained.

    Args:
        weight: Shape ``(out, in)``, any dtype; computed in float64 on its device.
        rank: Trained directions ``r``, of ``min(out, in)``.
        name: For errors.

    Raises:
        DecompositionError: The weight holds a NaN or an infinity.
    """
    if not bool(torch.isfinite(weight).all()):
        raise DecompositionError(
            "the weight holds NaN or infinite numbers", where=name, remedy="use an intact copy of the model"
        )
    exact = weight.detach().double()
    if weight.shape[0] >= weight.shape[1]:
        return _split_tall(exact, rank)
    turned = _split_tall(exact.mT, rank)
    return replace(turned, u=turned.v.mT, v=turned.u.mT)


def _split_tall(weight: Tensor, rank: int) -> SubspaceSplit:
    """Split a weight with at least as many rows as columns."""
    protected = weight.shape[1] - rank
    eigenvalues, vectors = torch.linalg.eigh(weight.mT @ weight)
    squares, right = eigenvalues.flip(0).clamp(min=0), vectors.flip(1).mT
    values, error = squares.sqrt(), _error(squares, protected)
    if error > GRAM_TOLERANCE:
        _, values, right = torch.linalg.svd(weight, full_matrices=False)
        error = _error(values, protected)
    left, reached = torch.linalg.qr(weight @ right.mT)  # its first columns span what the first rows of `right` reach
    left = left * torch.where(reached.diagonal() < 0, -1.0, 1.0)  # so that a value is how far its direction is reached
    return SubspaceSplit(left, right, values, protected, error)


def _error(values: Tensor, protected: int) -> float:
    """Bound the error of the spans: rounding of the largest value over the gap at the cut.

    Values on both sides of the cut that are equal within rounding leave the choice open, not the guarantee.
    """
    if protected in (0, len(values)):
        return 0.0
    gap = float(values[protected - 1] - values[protected])
    rounding = torch.finfo(torch.float64).eps * float(values[0])
    return rounding / gap if gap > 0 else float("inf")
