from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_hub.parallel.clipping import clip_grad_norm, clip_grad_value, total_norm


def parameters(scale: float) -> list[nn.Parameter]:
    torch.manual_seed(0)
    made = [nn.Parameter(torch.zeros(shape)) for shape in ((7, 5), (3,), (2, 2))]
    for parameter in made[:2]:  # the last one has no gradient
        parameter.grad = scale * torch.randn_like(parameter)
    return made


@pytest.mark.parametrize("scale", [1e-3, 10.0])
def test_clipping_by_norm_is_that_of_torch(scale: float) -> None:
    ours, theirs = parameters(scale), parameters(scale)
    assert clip_grad_norm(ours, 1.0) == pytest.approx(float(nn.utils.clip_grad_norm_(theirs, 1.0)), rel=1e-6)
    for mine, other in zip(ours[:2], theirs, strict=False):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=0)


def test_clipping_by_value_bites() -> None:
    clipped, before = parameters(10.0), float(total_norm(parameters(10.0)))
    clip_grad_value(clipped, 0.1)
    assert clipped[0].grad is not None
    assert clipped[0].grad.abs().max() == pytest.approx(0.1)
    assert total_norm(clipped) < before / 10


def test_no_gradients_have_no_norm() -> None:
    assert total_norm([nn.Parameter(torch.zeros(3))]) == 0
