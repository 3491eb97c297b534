"""The change stays where nothing is protected, and reaches all of that."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_hub.methods.osft.bases import STORED_BASIS, decompose
from lightning_hub.methods.osft.delta_exact import Complement, ExactDelta
from lightning_hub.methods.osft.subspace import DecompositionError, SubspaceSplit, split_subspace, trained_rank

SHAPES = {"square": (24, 24), "tall": (40, 16), "wide": (16, 40)}


def filled(weight: Tensor, ratio: float, complement: Complement = "full") -> tuple[ExactDelta, SubspaceSplit]:
    delta = ExactDelta((weight.shape[0], weight.shape[1]), ratio, complement, weight.dtype)
    if weight.dtype == torch.float64:
        delta.double()
    found = split_subspace(weight, delta.rank)
    with torch.no_grad():
        for name, basis in delta.bases_of(found).items():
            getattr(delta, name).copy_(basis)
    if delta.needs_stored_basis(found):
        delta.kept = found.long_side.float()
    return delta, found


def weight_of(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def leaks(change: Tensor, found: SubspaceSplit) -> tuple[float, float]:
    """Return the share of a change that lies in the protected columns, and in the protected rows."""
    exact = change.double()
    left = found.u[:, : found.protected].mT @ exact
    right = exact @ found.v[: found.protected].mT
    return float(left.norm() / exact.norm()), float(right.norm() / exact.norm())


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda trained: torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1),
    "sgd": lambda trained: torch.optim.SGD(trained, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda trained: torch.optim.Adafactor(trained, lr=0.3),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("complement", ["full", "thin"])
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_leaks_whatever_moves_it(shape: str, complement: Complement, optimizer: str) -> None:
    weight = weight_of(SHAPES[shape])
    delta, found = filled(weight, 0.25, complement)
    stepper = OPTIMIZERS[optimizer]([delta.delta])
    inputs, wanted = torch.randn(64, weight.shape[1]), torch.randn(64, weight.shape[0])
    for _ in range(200):
        stepper.zero_grad()
        ((inputs @ delta(weight).mT - wanted) ** 2).mean().backward()
        nn.utils.clip_grad_norm_([delta.delta], 1.0)
        stepper.step()
    change = delta.dense(weight).detach()
    assert change.norm() > 0.01
    assert max(leaks(change, found)) <= 1e-5


@pytest.mark.parametrize("complement", ["full", "thin"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_reaches_exactly_the_set(shape: str, complement: Complement) -> None:
    weight = weight_of(SHAPES[shape]).double()
    delta, found = filled(weight, 0.25, complement)
    jacobian = torch.autograd.functional.jacobian(
        lambda trained: torch.func.functional_call(_Change(delta), {"inner.delta": trained}, (weight,)), delta.delta
    )
    rank = int(torch.linalg.matrix_rank(jacobian.reshape(weight.numel(), -1)))
    rows, columns = weight.shape
    low = delta.rank
    expected = low * max(low, max(rows, columns) - found.protected) if complement == "full" else low * low
    assert rank == expected


class _Change(nn.Module):
    def __init__(self, inner: ExactDelta) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, weight: Tensor) -> Tensor:
        return self.inner.dense(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_step_the_weight_is_the_same_to_the_bit(shape: str, dtype: torch.dtype) -> None:
    weight = weight_of(SHAPES[shape]).to(dtype)
    delta, _ = filled(weight, 0.25)
    assert delta(weight).dtype == dtype
    assert delta(weight).equal(weight)


def test_with_everything_trained_it_is_full_fine_tuning() -> None:
    weight = weight_of((16, 40))
    delta, _ = filled(weight, 1.0)
    dense = nn.Parameter(weight.clone())
    steppers = [torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.0) for parameter in (delta.delta, dense)]
    inputs, wanted = torch.randn(64, 40), torch.randn(64, 16)
    for _ in range(20):
        for stepper, made in zip(steppers, (lambda: delta(weight), lambda: dense), strict=True):
            stepper.zero_grad()
            ((inputs @ made().mT - wanted) ** 2).mean().backward()  # type: ignore[no-untyped-call]
            stepper.step()
    assert float((delta(weight) - dense).norm() / (dense - weight).norm()) <= 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["rank-deficient", "zero", "steep"])
def test_weights_that_are_hard_to_split(shape: str, kind: str) -> None:
    rows, columns = SHAPES[shape]
    if kind == "rank-deficient":
        weight = weight_of((rows, 4)) @ weight_of((4, columns), seed=1)
    elif kind == "zero":
        weight = torch.zeros(rows, columns)
    else:
        whole = torch.linalg.svd(weight_of((rows, columns)), full_matrices=False)
        weight = whole.U * torch.logspace(0, -6, min(rows, columns)) @ whole.Vh
    delta, found = filled(weight, 0.25)
    for basis in (found.u, found.v.mT):
        assert float((basis.mT @ basis - torch.eye(basis.shape[1])).abs().max()) < 1e-12
    with torch.no_grad():
        delta.delta.normal_()
    assert max(leaks(delta.dense(weight).detach(), found)) <= 1e-5


def falling(by: float) -> Callable[[Tensor], Tensor]:
    return lambda places: torch.exp(-places * math.log(by))


SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "falling by 10": falling(10),
    "falling by 30": falling(30),
    "falling by 100": falling(100),
    "falling by 1000": falling(1000),
    "one of 10": lambda places: torch.where(places > 0, 1 - places / 4, 10),
    "one of 900": lambda places: torch.where(places > 0, 1 - places / 4, 900),
    "a cliff": lambda places: torch.where(places < 0.9, 1 - places / 4, 1e-3 * (2 - places)),
}
"""Singular values by their place, 0 for the largest and about 1 for the smallest protected one."""


def weight_with(shape: tuple[int, int], spectrum: Callable[[Tensor], Tensor]) -> Tensor:
    whole = torch.linalg.svd(weight_of(shape).double(), full_matrices=False)
    size = min(shape)
    weight: Tensor = (whole.U * spectrum(torch.arange(size) / (0.75 * size))) @ whole.Vh
    return weight.float()


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(96, 96), (160, 96), (112, 96), (96, 400)])
def test_no_spectrum_leaks_more_than_is_said(shape: tuple[int, int], spectrum: str) -> None:
    weight = weight_with(shape, SPECTRA[spectrum])
    exact, gathered, rounded = (
        ExactDelta(shape, 0.25, "full"),
        ExactDelta(shape, 0.25, "full", is_rounded=True),
        ExactDelta(shape, 0.25, "full", torch.bfloat16),
    )
    for delta, most in ((exact, 1e-5), (gathered, 1e-5), (rounded, 5e-3)):
        own = weight.bfloat16() if delta is rounded else weight
        for name, basis in decompose(own, delta, "weight").items():
            setattr(delta, name, basis if name == STORED_BASIS else nn.Parameter(basis, requires_grad=False))
        with torch.no_grad():
            delta.delta.normal_(generator=torch.Generator().manual_seed(1))
        assert max(leaks(delta.dense(own).detach(), split_subspace(own, delta.rank))) <= most
    change = gathered.dense(weight).detach()
    forward = deepcopy(gathered).bfloat16().dense(weight.bfloat16()).detach()
    assert distance(forward.float(), change) <= 1e-2, "what is computed in bfloat16 is what is exported"
    assert exact.kept is None or rounded.kept is not None


def test_tiny_singular_values_leave_every_basis_finite() -> None:
    weight = torch.zeros(12, 8)
    weight.diagonal().copy_(10.0 ** -torch.arange(0, 32, 4))
    delta = ExactDelta((12, 8), 0.25, "full")
    assert all(basis.isfinite().all() for basis in decompose(weight, delta, "weight").values())


def test_the_span_is_that_of_the_singular_values() -> None:
    weight = weight_of((30, 20)).double()
    found = split_subspace(weight, 5)
    exact = torch.linalg.svd(weight, full_matrices=False)
    assert float((found.values - exact.S).abs().max()) < 1e-10
    for ours, theirs in ((found.u[:, :15], exact.U[:, :15]), (found.v[:15].mT, exact.Vh[:15].mT)):
        assert float((ours @ ours.mT - theirs @ theirs.mT).norm()) < max(1e-9, 10 * found.error)


def test_a_weight_that_is_no_number_is_named() -> None:
    with pytest.raises(DecompositionError, match=r"layers\.3\.up_proj"):
        split_subspace(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), 1, "layers.3.up_proj")


@given(st.integers(0, 1000), st.integers(1, 20000))
def test_ranks_grow_with_the_ratio_and_are_exact_at_its_ends(thousandths: int, size: int) -> None:
    ratio = thousandths / 1000
    rank = trained_rank(ratio, size)
    assert abs(rank - ratio * size) <= 0.5 + 1e-6
    assert trained_rank(0.0, size) == 0
    assert trained_rank(1.0, size) == size
    assert rank <= trained_rank(min(1.0, (thousandths + 1) / 1000), size)


def test_ratios_mean_what_they_say_in_decimal() -> None:
    assert (trained_rank(0.1, 10), trained_rank(0.9, 10), trained_rank(0.3, 768)) == (1, 9, 230)
