"""The exact delta form: a weight is ``W0`` plus a change that lives where nothing is protected.

``W0`` (N x M) stays as it is. The change is

=======  ==================================  ===============
shape    change                              trained
=======  ==================================  ===============
square   ``U_l D V_l``                       ``D``: r x r
tall     ``(I - U_h U_h^T) B V_l``           ``B``: N x r
wide     ``U_l B (I - V_h^T V_h)``           ``B``: r x M
thin     ``U_l D V_l``, for any shape        ``D``: r x r
=======  ==================================  ===============

with ``U_h, V_h`` the protected and ``U_l, V_l`` the other singular directions. The form reaches exactly the set
``{dW: U_h^T dW = 0, dW V_h^T = 0}`` (thin: a part of it for weights that are not square), whatever optimizer, weight
decay, clipping or precision moves the trained numbers. With everything trained (k = 0) the change is the trained
matrix itself, so that training is full fine-tuning along the very same path.

The set is the same for a weight and its transpose, so it does not matter which way round a layer stores it.
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
"""Up to which amplification of rounding the projector of the long side is computed from ``W0`` itself: here less than
1e-5 leaks in float32. Beyond it the basis is kept instead."""

AMPLIFIED_ROUNDED = 2.5
"""The same where the bases are bfloat16, or the projector is computed in it: less than 5e-3 leaks, of which 1.4e-3
by the rounding of the other bases."""

NEGLIGIBLE = 1e-8
"""Singular values below this share of the largest count as zero."""


class ExactDelta(SingleDelta):
    """The change of a weight in its exact form.

    The long side's basis is never stored where the weight itself can give it: ``U_h U_h^T = W0 G W0^T`` with
    ``G = V_h^T S_h^-2 V_h``, and the same mirrored. For the layers of a decoder that saves a fifth of all memory.

    Args:
        shape: Of the weight as it is stored, without experts.
        ratio: Share of the singular directions that may be trained.
        complement: ``full`` reaches the whole set, ``thin`` only what spans both trained sides.
        dtype: Of the bases.
        experts: How many weights there are, if each expert has its own; None for one without an axis for them.
        taken: Directions that earlier tasks have taken of those that would be trained.
        is_rounded: Whether bfloat16 takes part in what gives the projector of the long side.
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
        taken: int = 0,
        *,
        is_rounded: bool = False,
    ) -> None:
        super().__init__()
        out, into = shape
        self.limit = AMPLIFIED_ROUNDED if is_rounded or torch.finfo(dtype).bits == 16 else AMPLIFIED
        self.rank = trained_rank(ratio, min(shape)) - taken
        self.taken = taken
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
        """Return the shapes of what is kept of the split; all of it lies on the short side, or is thin."""
        high: dict[str, tuple[int, ...]] = {"inverse_squares": (self.protected, 1)}
        if self.side == "both":
            return {"u_low": (out, self.rank), "v_low": (self.rank, into)}
        if self.side == "left":
            return high | {"v_low": (self.rank, into), "v_high": (self.protected, into)}
        return high | {"u_low": (out, self.rank), "u_high": (out, self.protected)} if self.side == "right" else {}

    @property
    def basis_names(self) -> list[str]:
        """The names of what is kept of the split."""
        return [name for name, _ in self.named_parameters() if name != "delta"]

    def bases_of(self, split: SubspaceSplit) -> dict[str, Tensor]:
        """Return from the split of a weight what is kept of it, by name, in float64."""
        protected = split.protected
        values = split.values[:protected]
        every = {
            "u_high": split.u[:, :protected],
            "u_low": split.u[:, protected:],
            "v_high": split.v[:protected],
            "v_low": split.v[protected:],
            # Those of which float32 could not hold the square are of weights whose basis is kept.
            "inverse_squares": torch.where(values > NEGLIGIBLE * split.values[0], values**-2, 0.0)[:, None],
        }
        return {name: every[name] for name in self.basis_names}

    def needs_kept(self, split: SubspaceSplit) -> bool:
        """Say whether the weight cannot give the basis of its long side accurately."""
        if self.side not in ("left", "right"):
            return False
        if self.taken:  # the weight knows nothing of what earlier tasks have learnt
            return True
        return split.amplification > self.limit

    def plan(self) -> str:
        """Return what decides its bases beside the weight."""
        return f"{self.rank} {self.side}" + f" {self.limit:g}" * (self.side in ("left", "right"))

    def factors(self, weight: Tensor) -> Factors:
        """Return the factors of the change."""
        delta = whole_gradient(self.delta)
        if self.side == "all":
            return delta, None
        if self.side == "both":
            return self.u_low.to(delta.dtype), delta @ self.v_low.to(delta.dtype)
        if self.side == "left":
            return delta - self._protected_left(weight.to(delta.dtype), delta), self.v_low.to(delta.dtype)
        return self.u_low.to(delta.dtype), delta - self._protected_right(weight.to(delta.dtype), delta)

    def leak(self, weight: Tensor, change: Tensor) -> tuple[float, float]:
        """Return the share of any change of the weight that lies in its protected columns, and in its rows."""
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

    def _kept(self, like: Tensor) -> Tensor | None:
        """Return the kept basis, in the form in which it goes with ``like``."""
        if self.kept is None:
            return None
        kept = self.kept.to(like.dtype)
        if isinstance(like, DTensor) and not isinstance(kept, DTensor):
            return DTensor.from_local(kept, like.device_mesh, [Replicate()] * like.device_mesh.ndim)
        return kept

    def _protected_left(self, weight: Tensor, delta: Tensor) -> Tensor:
        """Return the part of the columns of ``delta`` that lies in the span of ``U_h``."""
        kept = self._kept(delta)
        if kept is not None:
            return kept @ (kept.mT @ delta)
        v_high = self.v_high.to(delta.dtype)
        return weight @ (v_high.mT @ (self.inverse_squares * (v_high @ (weight.mT @ delta))))

    def _protected_right(self, weight: Tensor, delta: Tensor) -> Tensor:
        """Return the part of the rows of ``delta`` that lies in the span of ``V_h``."""
        kept = self._kept(delta)
        if kept is not None:
            return (delta @ kept.mT) @ kept
        u_high = self.u_high.to(delta.dtype)
        return ((((delta @ weight.mT) @ u_high) * self.inverse_squares.mT) @ u_high.mT) @ weight


def _side(out: int, into: int, complement: Complement, protected: int) -> Side:
    """Return on which sides the trained numbers are cut to the trained directions."""
    if protected == 0:
        return "all"
    if out == into or complement == "thin":
        return "both"
    return "left" if out > into else "right"
