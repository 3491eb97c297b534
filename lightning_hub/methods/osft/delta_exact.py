"""The exact delta: a weight is ``W0`` plus a delta that is orthogonal to the protected directions.

``W0`` (N x M) is frozen. The delta is

=======  ==================================  ===============
shape    delta                               trained
=======  ==================================  ===============
square   ``U_l D V_l``                       ``D``: r x r
tall     ``(I - U_h U_h^T) B V_l``           ``B``: N x r
wide     ``U_l B (I - V_h^T V_h)``           ``B``: r x M
thin     ``U_l D V_l``, for any shape        ``D``: r x r
=======  ==================================  ===============

with ``U_h, V_h`` the protected and ``U_l, V_l`` the other singular directions of ``W0``. This is the constraint of
orthogonal subspace fine-tuning (arXiv 2504.07097, section 3). The delta can be every matrix of the set
``{dW: U_h^T dW = 0, dW V_h^T = 0}`` (thin: only some of them for weights that are not square) and no other, for every
optimizer, weight decay, clipping and precision. With everything trained (k = 0) the delta is the trained matrix itself,
and training is the same as full fine-tuning.

The set is the same for a weight and its transpose, so it does not matter in which orientation a layer stores it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from lightning_hub.methods.osft.subspace import SubspaceSplit, trained_rank
from lightning_hub.methods.osft.weight_delta import Factors, SingleDelta, whole_gradient

Complement = Literal["full", "thin"]

Side = Literal["all", "both", "left", "right"]

AMPLIFIED = 30.0
"""The largest amplification of rounding with which the projector of the long side is computed from ``W0``: less than
1e-5 leaks in float32. Above it the basis is stored."""

AMPLIFIED_ROUNDED = 2.5
"""The same for bfloat16 bases, or a projector that is computed in bfloat16: less than 5e-3 leaks, of which 1.4e-3 by
the rounding of the other bases."""

NEGLIGIBLE = 1e-8
"""Singular values below this share of the largest count as zero."""


class ExactDelta(SingleDelta):
    """The exact delta of a weight.

    The basis of the longer side is not stored where the weight can give it: ``U_h U_h^T = W0 G W0^T`` with
    ``G = V_h^T S_h^-2 V_h``, and the transpose of this for wide weights. For the layers of a decoder this saves a fifth
    of all memory.

    Args:
        shape: Shape of the weight as it is stored, without the dim of experts.
        ratio: Share of the singular directions that may be trained.
        complement: ``full`` for the complete set above, ``thin`` for ``U_l D V_l`` with every shape.
        dtype: dtype of the bases.
        experts: Number of experts, if the weight has a dim of experts; else None.
        num_reserved: Trainable directions that the deltas of previous tasks use; they are protected.
        is_rounded: Whether the projector of the long side is computed with bfloat16 tensors.
    """

    delta: nn.Parameter
    u_low: nn.Parameter
    u_high: nn.Parameter
    v_low: nn.Parameter
    v_high: nn.Parameter
    inverse_squares: nn.Parameter

    def __init__(
        self,
        shape: tuple[int, int],
        ratio: float,
        complement: Complement,
        dtype: torch.dtype = torch.float32,
        experts: int | None = None,
        num_reserved: int = 0,
        *,
        is_rounded: bool = False,
    ) -> None:
        super().__init__()
        out, into = shape
        self.limit = AMPLIFIED_ROUNDED if is_rounded or torch.finfo(dtype).bits == 16 else AMPLIFIED
        self.rank = trained_rank(ratio, min(shape)) - num_reserved
        self.num_reserved = num_reserved
        self.protected = min(shape) - self.rank
        self.side = _side(out, into, complement, self.protected)
        lead = () if experts is None else (experts,)
        trained = {"all": shape, "both": (self.rank, self.rank), "left": (out, self.rank), "right": (self.rank, into)}
        self.delta = nn.Parameter(torch.zeros(*lead, *trained[self.side], dtype=torch.float32))
        for name, basis in self._bases(out, into).items():
            empty = torch.zeros(*lead, *basis, dtype=torch.float32 if name == "inverse_squares" else dtype)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.register_buffer("kept", None)

    def _bases(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the stored bases by name, without experts; all are on the shorter side, or thin."""
        high: dict[str, tuple[int, ...]] = {"inverse_squares": (self.protected, 1)}
        if self.side == "both":
            return {"u_low": (out, self.rank), "v_low": (self.rank, into)}
        if self.side == "left":
            return high | {"v_low": (self.rank, into), "v_high": (self.protected, into)}
        return high | {"u_low": (out, self.rank), "u_high": (out, self.protected)} if self.side == "right" else {}

    @property
    def basis_names(self) -> list[str]:
        """The names of the stored bases."""
        return [name for name, _ in self.named_parameters() if name != "delta"]

    def bases_of(self, split: SubspaceSplit) -> dict[str, Tensor]:
        """Return the stored bases of a split by name, float64, in the shapes of `_bases`."""
        protected = split.protected
        values = split.values[:protected]
        every = {
            "u_high": split.u[:, :protected],
            "u_low": split.u[:, protected:],
            "v_high": split.v[:protected],
            "v_low": split.v[protected:],
            # Values so small that float32 overflows occur only in weights whose basis is stored.
            "inverse_squares": torch.where(values > NEGLIGIBLE * split.values[0], values**-2, 0.0)[:, None],
        }
        return {name: every[name] for name in self.basis_names}

    def needs_stored_basis(self, split: SubspaceSplit) -> bool:
        """Return whether the basis of the longer side must be stored: the weight cannot give it accurately."""
        if self.side not in ("left", "right"):
            return False
        if self.num_reserved:  # the directions of previous tasks cannot be computed from the weight
            return True
        return split.amplification > self.limit

    def plan(self) -> str:
        """Return what its bases depend on beside the weight; a part of the cache key."""
        plan = f"{self.rank} {self.side}"
        return f"{plan} {self.limit:g}" if self.side in ("left", "right") else plan

    def factors(self, weight: Tensor) -> Factors:
        """Return the factors of the delta, float32: ``(out, r)`` and ``(r, in)``, or the dense delta and None."""
        delta = whole_gradient(self.delta)
        if self.side == "all":
            return delta, None
        if self.side == "both":
            return self.u_low.to(delta.dtype), delta @ self.v_low.to(delta.dtype)
        if self.side == "left":
            return delta - self._protected_left(weight.to(delta.dtype), delta), self.v_low.to(delta.dtype)
        return self.u_low.to(delta.dtype), delta - self._protected_right(weight.to(delta.dtype), delta)

    def leak(self, weight: Tensor, change: Tensor) -> tuple[float, float]:
        """Return the share of the norm of ``change`` in the protected columns, and in the protected rows (0 to 1)."""
        norm = float(change.norm()) or 1.0
        exact, own = weight.to(change.dtype), {name: getattr(self, name).to(change.dtype) for name in self.basis_names}
        left = right = torch.zeros((), dtype=change.dtype)
        if self.side == "left":
            left = self._protected_left(exact, change)
        elif "u_low" in own:
            left = change - own["u_low"] @ (own["u_low"].mT @ change)
        if self.side == "right":
            right = self._protected_right(exact, change)
        elif "v_low" in own:
            right = change - (change @ own["v_low"].mT) @ own["v_low"]
        return float(left.norm()) / norm, float(right.norm()) / norm

    def sharded_params(self, dim: int) -> dict[str, int]:
        """Return which parameters are sharded, and along which dim, when the weight is sharded along ``dim``.

        If the rows of the weight are sharded, so are the left bases and what trains in its rows; the right ones if its
        columns are.
        """
        names = {0: ("u_low", "u_high"), 1: ("v_low", "v_high")}[dim]
        sharded = {name: dim for name in self.basis_names if name in names}
        if self.side in ("all", "left" if dim == 0 else "right"):
            sharded["delta"] = dim
        return sharded

    def _stored_basis(self, like: Tensor) -> Tensor | None:
        """Return the stored basis in the dtype of ``like``, as a DTensor if ``like`` is one; None if there is none."""
        if self.kept is None:
            return None
        basis = self.kept.to(like.dtype)
        if isinstance(like, DTensor) and not isinstance(basis, DTensor):
            return DTensor.from_local(basis, like.device_mesh, [Replicate()] * like.device_mesh.ndim)
        return basis

    def _protected_left(self, weight: Tensor, delta: Tensor) -> Tensor:
        """Return the projection of the columns of ``delta`` onto the span of ``U_h``; the shape of ``delta``."""
        basis = self._stored_basis(delta)
        if basis is not None:
            return basis @ (basis.mT @ delta)
        v_high = self.v_high.to(delta.dtype)
        return weight @ (v_high.mT @ (self.inverse_squares * (v_high @ (weight.mT @ delta))))

    def _protected_right(self, weight: Tensor, delta: Tensor) -> Tensor:
        """Return the projection of the rows of ``delta`` onto the span of ``V_h``; the shape of ``delta``."""
        basis = self._stored_basis(delta)
        if basis is not None:
            return (delta @ basis.mT) @ basis
        u_high = self.u_high.to(delta.dtype)
        return ((((delta @ weight.mT) @ u_high) * self.inverse_squares.mT) @ u_high.mT) @ weight


def _side(out: int, into: int, complement: Complement, protected: int) -> Side:
    """Return the sides on which the trained tensor has only the ``r`` trained directions."""
    if protected == 0:
        return "all"
    if out == into or complement == "thin":
        return "both"
    return "left" if out > into else "right"
