"""The published form: a weight as frozen ``U_h S_h V_h`` and trained ``U_l S_l V_l`` (arXiv 2504.07097, section 3).

Gradients are projected before clipping, and the factors themselves after each step of the optimizer: an optimizer such
as Adam leaves the subspace although every gradient lies in it. The form is kept as the reference that the exact one is
compared with, and for runs that are to follow the published path. It takes more memory than any other.

The weight itself stays in place here too, and the trained part is counted from where it began:
``dW = U_l S_l V_l - (U_l S_l V_l)(0)``. That is the same weight at every step, without the rounding of a product of
factors, so that nothing has changed before the first step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_hub.methods.osft.subspace import SubspaceSplit, trained_rank
from lightning_hub.methods.osft.weight_delta import Factors, SingleDelta, whole_gradient


class UsvDelta(SingleDelta):
    """The change of a weight in the published form.

    Args:
        shape: Of the weight as it is stored, without experts.
        ratio: Share of the singular directions that may be trained.
        dtype: Of the frozen directions; what trains is float32.
        experts: How many weights there are, if each expert has its own; None for one without an axis for them.
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
            for place in (name, f"{name}_low"):
                empty = torch.zeros(*lead, *size, dtype=torch.float32)
                self.register_parameter(place, nn.Parameter(empty, requires_grad=place == name))
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
        """The names of what is kept of the split."""
        return [name for name, _ in self.named_parameters() if name not in ("u", "s", "v")]

    def plan(self) -> str:
        """Return what decides its bases beside the weight."""
        return f"{self.rank} usv"

    def bases_of(self, split: SubspaceSplit) -> dict[str, Tensor]:
        """Return from the split of a weight all directions and the trained values, in float64."""
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
        """Start at the weight's own small directions."""
        for name in ("u", "s", "v"):
            self.get_parameter(name).copy_(self.get_parameter(f"{name}_low"))

    def factors(self, weight: Tensor) -> Factors:
        """Return ``[U S - U0 S0, U0 S0]`` and ``[V; V - V0]``, whose product is exactly 0 before the first step."""
        u, s, v = (whole_gradient(one) for one in (self.u, self.s, self.v))
        begun = self.u_low * self.s_low.mT
        return torch.cat([u * s.mT - begun, begun], -1), torch.cat([v, v - self.v_low], -2)

    def leak(self, weight: Tensor, change: Tensor) -> tuple[float, float]:
        """Return the share of any change of the weight that lies in its protected columns, and in its rows."""
        norm = float(change.norm()) or 1.0
        u_high, v_high = self.u_high.to(change.dtype), self.v_high.to(change.dtype)
        return float((u_high.mT @ change).norm()) / norm, float((change @ v_high.mT).norm()) / norm

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Take out of the gradients of both bases what lies in protected directions."""
        if self.u.grad is not None and self.v.grad is not None:
            self._project(self.u.grad, self.v.grad)

    @torch.no_grad()
    def project(self) -> None:
        """Take the same out of the bases."""
        self._project(self.u, self.v)

    def _project(self, u: Tensor, v: Tensor) -> None:
        u_high, v_high = self.u_high.to(u.dtype), self.v_high.to(v.dtype)
        u -= u_high @ (u_high.mT @ u)
        v -= (v @ v_high.mT) @ v_high
