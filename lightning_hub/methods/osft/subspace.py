"""Splits the singular directions of a weight into protected and trainable ones.

Of a weight ``W`` (out x in) with singular value decomposition ``U S V^T``, the ``k`` largest singular directions are
protected; the other ``r`` may be trained (orthogonal subspace fine-tuning, arXiv 2504.07097, section 3). Only the two
spans are needed. An eigenvalue decomposition of the Gram matrix of the shorter side gives them for that side, and a QR
decomposition for the other side. With QR both sides are orthonormal to float64 rounding, also for a ``W`` without full
rank; a division by the singular values would not give this.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from lightning_hub.errors import HubError

GRAM_TOLERANCE = 1e-10
"""Relative error of the spans above which a full SVD is used, which is slower and more accurate."""


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
        error: Upper bound of the relative error of the two spans.
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
        """The protected directions of the longer side: ``(out, k)`` for a tall weight, ``(k, in)`` for a wide one."""
        return self.u[:, : self.protected] if self.u.shape[0] > self.v.shape[1] else self.v[: self.protected]

    @property
    def amplification(self) -> float:
        """Factor by which rounding of the shorter side grows, when the longer side is computed from the weight.

        For a tall weight, ``u_i = W v_i / s_i``: an error of ``v_i`` is multiplied by the root mean square of all
        singular values over ``s_i``, in each of the ``k`` protected directions. It is compared with a delta that has
        ``long - k`` directions. For a wide weight the same holds for the transpose.
        """
        high = self.values[: self.protected]
        if not len(high) or not high[-1]:
            return float("inf") if len(high) else 0.0
        free = max(self.u.shape[0], self.v.shape[1]) - self.protected
        spread = self.values.square().mean() * high.pow(-2).mean()
        return float((spread * 2 * self.protected / max(1, free)).sqrt())


def trained_rank(ratio: float, size: int) -> int:
    """Return how many of ``size`` directions train: the nearest integer to ``ratio * size``, halves upwards.

    The ratio is read as the decimal number that is written, so rounding of floats has no effect: 0.1 of 10 is 1.
    """
    return int(Fraction(str(ratio)) * size + Fraction(1, 2))


def split_subspace(weight: Tensor, rank: int, name: str = "weight") -> SubspaceSplit:
    """Split a weight so that its ``rank`` smallest singular directions may be trained.

    Args:
        weight: Shape ``(out, in)``, any dtype; computed in float64 on its device.
        rank: Trained directions ``r``, of ``min(out, in)``.
        name: For errors.

    Raises:
        DecompositionError: The weight has NaN or infinite numbers.
    """
    if not bool(torch.isfinite(weight).all()):
        raise DecompositionError(
            "the weight has NaN or infinite numbers", where=name, remedy="use an intact copy of the model"
        )
    exact = weight.detach().double()
    if weight.shape[0] >= weight.shape[1]:
        return _split_tall(exact, rank)
    transposed = _split_tall(exact.mT, rank)
    return replace(transposed, u=transposed.v.mT, v=transposed.u.mT)


def _split_tall(weight: Tensor, rank: int) -> SubspaceSplit:
    """Split a weight with at least as many rows as columns."""
    protected = weight.shape[1] - rank
    eigenvalues, vectors = torch.linalg.eigh(weight.mT @ weight)
    squares, right = eigenvalues.flip(0).clamp(min=0), vectors.flip(1).mT
    values, error = squares.sqrt(), _error(squares, protected)
    if error > GRAM_TOLERANCE:
        _, values, right = torch.linalg.svd(weight, full_matrices=False)
        error = _error(values, protected)
    left, reached = torch.linalg.qr(weight @ right.mT)  # its first columns span the images of the first rows of `right`
    left = left * torch.where(reached.diagonal() < 0, -1.0, 1.0)  # signs such that the singular values are positive
    return SubspaceSplit(left, right, values, protected, error)


def _error(values: Tensor, protected: int) -> float:
    """Return a bound of the error of the spans: rounding of the largest value over the gap between the two spans.

    If the values on both sides of the gap are equal within rounding, either choice of directions is valid.
    """
    if protected in (0, len(values)):
        return 0.0
    gap = float(values[protected - 1] - values[protected])
    rounding = torch.finfo(torch.float64).eps * float(values[0])
    return rounding / gap if gap > 0 else float("inf")
