from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_hub.ops import attention
from lightning_hub.ops.attention import PACKED, cu_seqlens_of, packed_attention
from lightning_hub.ops.batch import PackedSequence
from lightning_hub.ops.loss import inputs_of
from tests.ops.models import CONFIGS, documents, make

LENGTHS = (7, 1, 12, 5)


def _packed_and_lone(family: str, attention: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a packed row, and of its documents one by one with transformers' own eager attention."""
    model, reference = make(family, attention).eval(), make(family, "eager").eval()
    pairs = documents(*LENGTHS)
    with torch.no_grad():
        packed = model(**inputs_of(model, PackedSequence.pack(pairs))).logits[0]
        lone = torch.cat([reference(ids.unsqueeze(0), use_cache=False).logits[0] for ids, _ in pairs])
    return packed, lone


@pytest.mark.parametrize("family", CONFIGS)
def test_documents_of_a_row_do_not_see_each_other(family: str) -> None:
    packed, lone = _packed_and_lone(family, PACKED)
    torch.testing.assert_close(packed, lone, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral, sliding window", "qwen3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_the_kernels_of_transformers_do_not_leak_either(family: str, attention: str) -> None:
    packed, lone = _packed_and_lone(family, attention)
    torch.testing.assert_close(packed, lone, rtol=0, atol=1e-5)


def test_one_document_over_the_whole_row_is_another_number() -> None:
    model = make("llama", PACKED).eval()
    row = PackedSequence.pack(documents(*LENGTHS))
    merged = PackedSequence(row.input_ids, row.labels, row.position_ids, (0, row.num_tokens), (0,))
    with torch.no_grad():
        difference = model(**inputs_of(model, row)).logits - model(**inputs_of(model, merged)).logits
    assert difference.abs().max() > 1e-2, "the test of leaks could not fail"


def test_a_mask_is_refused() -> None:
    model = make("llama", PACKED)
    states = torch.randn(1, 4, 6, 8)
    with pytest.raises(ValueError, match="do not take an attention mask"):
        packed_attention(model, states, states, states, torch.ones(1, 6))


def test_gradients_of_a_row_are_the_sum_of_its_documents() -> None:
    packed, lone = make("llama", PACKED), make("llama", "eager")
    pairs = documents(*LENGTHS)
    packed(**inputs_of(packed, PackedSequence.pack(pairs))).logits.square().sum().backward()
    for ids, _ in pairs:
        lone(ids.unsqueeze(0), use_cache=False).logits.square().sum().backward()
    for (name, ours), theirs in zip(packed.named_parameters(), lone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_borders_travel_on_the_host() -> None:
    boundaries = cu_seqlens_of(PackedSequence.pack(documents(3, 4)))
    assert boundaries == {"boundaries": (0, 3, 7), "packed_cu_seqlens": None}


class Kernel:
    """Stands for ``varlen_attn``, which needs a GPU: the same signature, one document after another."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype] = set()

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, boundaries_k: Tensor, longest: int,
        longest_k: int, *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:  # fmt: skip
        assert query.shape == key.shape, "older releases take no grouped heads"
        assert longest == longest_k == int(boundaries.diff().max())
        self.dtypes |= {query.dtype, key.dtype, value.dtype}
        parts = []
        for start, end in pairwise(boundaries.tolist()):
            q, k, v = (part[start:end].transpose(0, 1) for part in (query, key, value))
            reach = torch.arange(end - start)[:, None] - torch.arange(end - start)[None, :]
            mask = (reach >= 0) & (reach <= window_size[0] if window_size[0] >= 0 else reach >= 0)
            parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(0, 1))
        return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 3])
def test_mixed_precision_reaches_the_kernel_of_a_gpu(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    kernel = Kernel()
    monkeypatch.setattr(attention, "_varlen", lambda: kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8)
    value = torch.randn(1, 2, 20, 8, dtype=torch.bfloat16)  # what rotary embeddings leave of autocast's dtypes
    module, boundaries = torch.nn.Module(), (0, 7, 8, 20)
    cumulative = torch.tensor(boundaries, dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        fast, _ = packed_attention(
            module, query, key, value, None, boundaries=boundaries, packed_cu_seqlens=cumulative, sliding_window=window
        )
        slow, _ = packed_attention(module, query, key, value, None, boundaries=boundaries, sliding_window=window)
    assert kernel.dtypes == {torch.bfloat16}
    torch.testing.assert_close(fast, slow, rtol=0, atol=2e-2)


def test_a_kernel_that_knows_no_window_is_not_asked_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def older(query: Tensor, key: Tensor, value: Tensor, *boundaries: object, is_causal: bool = False) -> Tensor:
        raise AssertionError("it would attend to the whole document")

    monkeypatch.setattr(attention, "_varlen", lambda: older)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    states = torch.randn(1, 2, 6, 8, dtype=torch.bfloat16)
    cumulative = torch.tensor([0, 6], dtype=torch.int32)
    packed_attention(
        torch.nn.Module(),
        states,
        states,
        states,
        None,
        boundaries=(0, 6),
        packed_cu_seqlens=cumulative,
        sliding_window=2,
    )
