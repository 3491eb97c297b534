"""The published form: a weight as frozen ``U_h S_h V_h`` and trained ``U_l S_l V_l`` (arXiv 2504.07097, section 3).

Gradients are projected before clipping, and the factors after each step of the optimizer: a step of Adam leaves the
subspace although every gradient is in it. This form is the reference for comparisons with the exact one, and for runs
that must follow the published method. It takes more memory than the exact one.

The weight ``W0`` is frozen here too, and the delta is ``dW = U_l S_l V_l - (U_l S_l V_l)(0)``. This gives the same
weight at every step, without the rounding of the product ``(U_l S_l V_l)(0)``: before the first step the delta is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_hub.methods.osft.subspace import SubspaceSplit, trained_rank
from lightning_hub.methods.osft.weight_delta import Factors, SingleDelta, whole_gradient


class UsvDelta(SingleDelta):
    """The delta of a weight in the published form.

    Args:
        shape: Shape of the weight as it is stored, without the dim of experts.
        ratio: Share of the singular directions that may be trained.
        dtype: dtype of the protected directions; all that trains is float32.
        experts: Number of experts, if the weight has a dim of experts; else None.
    """

    def __init__(
        self, shape: tuple[int, int], ratio: float, dtype: torch.dtype = torch.float32, experts: int | None = None
    ) -> None:
        super().__init__()
        out, into = shape
        self.rank = trained_rank(ratio, min(shape))
        self.protected = min(shape) - self.rank
        lead = () if experts is None else (experts,)
        low = {"u": (out, self.rank), "s": (self.rank, 1), "v": (self.rank, into)}
        for name, size in low.items():
            for parameter in (name, f"{name}_low"):
                empty = torch.zeros(*lead, *size, dtype=torch.float32)
                self.register_parameter(parameter, nn.Parameter(empty, requires_grad=parameter == name))
        for name, size in {"u_high": (out, self.protected), "v_high": (self.protected, into)}.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(*lead, *size, dtype=dtype), requires_grad=False))
        self.register_buffer("kept", None)

    u: nn.Parameter
    s: nn.Parameter
    v: nn.Parameter
    u_low: nn.Parameter
    s_low: nn.Parameter
    v_low: nn.Parameter
    u_high: nn.Parameter
    v_high: nn.Parameter

    @property
    def basis_names(self) -> list[str]:
        """The names of the stored bases."""
        return [name for name, _ in self.named_parameters() if name not in ("u", "s", "v")]

    def plan(self) -> str:
        """Return what its bases depend on beside the weight; a part of the cache key."""
        return f"{self.rank} usv"

    def bases_of(self, split: SubspaceSplit) -> dict[str, Tensor]:
        """Return all directions and the trained singular values of a split by name, in float64."""
        u_low, s_low, v_low = split.trainable
        return {
            "u_high": split.u[:, : split.protected],
            "v_high": split.v[: split.protected],
            "u_low": u_low,
            "s_low": s_low[:, None],
            "v_low": v_low,
        }

    @torch.no_grad()
    def begin(self) -> None:
        """Set the trained factors to the smallest singular directions of the weight: a delta of zero."""
        for name in ("u", "s", "v"):
            self.get_parameter(name).copy_(self.get_parameter(f"{name}_low"))

    def factors(self, weight: Tensor) -> Factors:
        """Return ``[U S - U0 S0, U0 S0]`` and ``[V; V - V0]``, whose product is exactly 0 before the first step."""
        u, s, v = (whole_gradient(one) for one in (self.u, self.s, self.v))
        initial = self.u_low * self.s_low.mT
        return torch.cat([u * s.mT - initial, initial], -1), torch.cat([v, v - self.v_low], -2)

    def leak(self, weight: Tensor, change: Tensor) -> tuple[float, float]:
        """Return the share of the norm of ``change`` in the protected columns, and in the protected rows (0 to 1)."""
        norm = float(change.norm()) or 1.0
        u_high, v_high = self.u_high.to(change.dtype), self.v_high.to(change.dtype)
        return float((u_high.mT @ change).norm()) / norm, float((change @ v_high.mT).norm()) / norm

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Remove the protected directions from the gradients of both bases."""
        if self.u.grad is not None and self.v.grad is not None:
            self._project(self.u.grad, self.v.grad)

    @torch.no_grad()
    def project(self) -> None:
        """Remove the protected directions from both bases."""
        self._project(self.u, self.v)

    def _project(self, u: Tensor, v: Tensor) -> None:
        u_high, v_high = self.u_high.to(u.dtype), self.v_high.to(v.dtype)
        u -= u_high @ (u_high.mT @ u)
        v -= (v @ v_high.mT) @ v_high
