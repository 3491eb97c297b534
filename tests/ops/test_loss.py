from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lightning_hub.ops import loss
from lightning_hub.ops.attention import PACKED
from lightning_hub.ops.attention_proof import proven_loss
from lightning_hub.ops.batch import PackedSequence
from lightning_hub.ops.loss import linear_cross_entropy
from tests.ops.models import CONFIGS, LEAKING, documents, make


def _reference(
    family: str, pairs: list[tuple[torch.Tensor, torch.Tensor]], smoothing: float
) -> tuple[float, list[torch.Tensor]]:
    """Summed loss of lone documents from full logits, and the gradients."""
    model = make(family, "eager")
    total = torch.zeros(())
    for ids, labels in pairs:
        logits = model(ids.unsqueeze(0), use_cache=False).logits[0, :-1]
        total = total + F.cross_entropy(logits, labels[1:], reduction="sum", label_smoothing=smoothing)
    total.backward()
    return total.item(), [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


@pytest.mark.parametrize("family", [*CONFIGS, *LEAKING])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradients_equal_full_logits(family: str, smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 5)  # several chunks, the last one partial
    pairs = documents(9, 4, 13)
    model = make(family, PACKED)
    ours = proven_loss(model, smoothing)(PackedSequence.pack(pairs))
    ours.backward()
    expected, gradients = _reference(family, pairs, smoothing)
    assert ours.item() == pytest.approx(expected, rel=1e-5)
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("family", "linear"),
    [
        ("llama", True),
        ("qwen2", True),
        ("gpt2", True),
        ("gemma2, caps and sliding window", False),
        ("granite, scaled logits", False),
        ("cohere, scaled logits", False),
    ],
)
def test_a_head_is_known_by_its_numbers(family: str, linear: bool) -> None:
    assert proven_loss(make(family, PACKED)).capabilities.has_linear_head is linear


def test_bias_and_frozen_weights() -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(11, 8), torch.randn(17, 8), torch.randn(17)
    targets = torch.randint(17, (11,))
    ours, theirs = (tuple(t.clone().requires_grad_() for t in (hidden, bias)) for _ in range(2))
    linear_cross_entropy(ours[0], weight, ours[1], targets).mul(0.5).backward()
    F.cross_entropy(F.linear(theirs[0], weight, theirs[1]), targets, reduction="sum").mul(0.5).backward()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad)


def test_validation_makes_no_gradients() -> None:
    with torch.no_grad():
        value = proven_loss(make("llama", PACKED))(PackedSequence.pack(documents(9)))
    assert not value.requires_grad
    assert value > 0


def test_a_row_without_labels_is_a_zero_that_reaches_every_parameter() -> None:
    model = make("llama", PACKED)
    ids = documents(6)[0][0]
    value = proven_loss(model)(PackedSequence.pack([(ids, torch.full_like(ids, -100))]))
    value.backward()
    assert value.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_the_first_token_of_a_document_is_never_a_target() -> None:
    pairs = [(ids, ids) for ids, _ in documents(5, 6)]
    assert int((PackedSequence.pack(pairs).labels != -100).sum()) == 4 + 5


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_stays_near_full_precision(dtype: torch.dtype) -> None:
    row = PackedSequence.pack(documents(20, 30))
    model = make("llama", PACKED)
    exact = proven_loss(model)(row).item()
    with torch.autocast("cpu", dtype=dtype):
        rough = proven_loss(model)(row)
    rough.backward()
    assert rough.item() == pytest.approx(exact, rel=2e-2)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
