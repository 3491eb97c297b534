"""Whether the kernels of this device give the numbers that they must: one line for each check.

Packed documents are compared with the same documents alone, and the loss head with full logits. In float32 a bar is
a number. In bfloat16 it is the error of the plain way in the same precision, doubled: both are measured against
float64 or float32, which is the truth here.

usage: python -m benchmarks.exactness [--device cuda | cpu] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.records import table
from lightning_hub.ops.attention import PACKED, cu_seqlens_of, packed_attention
from lightning_hub.ops.attention_proof import proven_loss
from lightning_hub.ops.batch import PackedSequence

LENGTHS = (1, 300, 7, 128, 1000, 64)
BAR = 1e-4
"""Relative error that float32 may have: sums in another order, and no TF32."""


@dataclass(frozen=True)
class Check:
    """One comparison: what, in which precision, the relative error found and the error allowed."""

    what: str
    dtype: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the bar."""
        return self.error <= self.allowed


def difference(found: list[Tensor], truth: list[Tensor]) -> float:
    """Return the largest relative difference (by the Euclidean norm) of pairs of tensors."""
    pairs = zip(found, truth, strict=True)
    return max(float((one - other).norm() / other.norm()) for one, other in _in_float64(pairs))


def _in_float64(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for one, other in pairs:
        yield one.detach().double(), other.detach().double()


def attention_checks(device: str) -> Iterator[Check]:
    """Compare packed attention, forward and backward, with a plain softmax over each document."""
    for dtype in (torch.float32, torch.bfloat16):
        for window in (None, 100):
            states = _states(device, dtype)
            plain = partial(_plain, window=window)
            truth = _with_gradients(plain, [state.double() for state in states])
            alone = _with_gradients(plain, states)
            name = f"attention, {f'window {window}' if window else 'causal'}"
            for route, cumulative in _routes(device, dtype):
                found = _with_gradients(_packed(cumulative, window), states)
                allowed = BAR if dtype == torch.float32 else 2 * difference(alone, truth)
                yield Check(f"{name}, {route}", _name(dtype), difference(found, truth), allowed)


def _states(device: str, dtype: torch.dtype) -> list[Tensor]:
    """Return queries of 8 heads, keys and values of 2, each head of 64."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, heads, sum(LENGTHS), 64) for heads in (8, 2, 2))
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def _boundaries() -> tuple[int, ...]:
    boundaries = [0]
    for length in LENGTHS:
        boundaries.append(boundaries[-1] + length)
    return tuple(boundaries)


def _routes(device: str, dtype: torch.dtype) -> list[tuple[str, Tensor | None]]:
    """Return the ways of this device: the boundaries as a tensor lead to the kernel over the whole row."""
    routes: list[tuple[str, Tensor | None]] = [("one call a document", None)]
    if device == "cuda" and dtype != torch.float32:
        routes.append(("one kernel a row", torch.tensor(_boundaries(), dtype=torch.int32, device=device)))
    return routes


def _packed(cumulative: Tensor | None, window: int | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return packed_attention(
            nn.Module(),
            query,
            key,
            value,
            None,
            boundaries=_boundaries(),
            packed_cu_seqlens=cumulative,
            sliding_window=window,
        )[0]

    return attend


def _plain(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """Attend by the definition, one document after another."""
    parts = []
    for start, end in pairwise(_boundaries()):
        q, k, v = (states[:, :, start:end] for states in (query, key, value))
        k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (k, v))
        place = torch.arange(end - start, device=q.device)
        distance = place[:, None] - place[None, :]
        seen = (distance >= 0) & (distance < (window or end))
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
        parts.append(scores.softmax(-1) @ v)
    return torch.cat(parts, dim=2).transpose(1, 2)


def _with_gradients(attend: Callable[[Tensor, Tensor, Tensor], Tensor], states: list[Tensor]) -> list[Tensor]:
    """Return the output and the gradients of the three inputs under a fixed weighting of the output."""
    query, key, value = (state.detach().clone().requires_grad_() for state in states)
    output = attend(query, key, value)
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    return [output, *torch.autograd.grad((output * weights.to(output.dtype)).sum(), (query, key, value))]


def model_checks(device: str) -> Iterator[Check]:
    """Compare a packed row with its documents alone, and the loss head with full logits, in a whole model."""
    row = _row().to(device)
    truth_model = _model(device, "sdpa")
    truth, truth_gradients = _alone(truth_model, row), _full_logits(truth_model, row)
    merged = PackedSequence(row.input_ids, row.labels, row.position_ids, (0, row.num_tokens), (0,))
    assert difference(_logits(_model(device, PACKED), merged), truth) > 0.1, "this could not notice a leak"
    for dtype in ("float32", "bfloat16", "bfloat16 mixed"):
        plain, packed = _model(device, "sdpa", dtype), _model(device, PACKED, dtype)
        with _precision(device, dtype):
            exact = dtype == "float32"
            allowed = BAR if exact else 2 * difference(_alone(plain, row), truth)
            yield Check("packed logits", dtype, difference(_logits(packed, row), truth), allowed)
            allowed = BAR if exact else 2 * difference(_full_logits(plain, row), truth_gradients)
            yield Check(
                "loss and gradients of the head", dtype, difference(_fused(packed, row), truth_gradients), allowed
            )


def _row() -> PackedSequence:
    generator = torch.Generator().manual_seed(1)
    documents = []
    for length in LENGTHS:
        ids = torch.randint(3, 4000, (length,), generator=generator)
        documents.append((ids, ids.where(torch.rand(length, generator=generator) < 0.6, -100)))
    return PackedSequence.pack(documents)


def _model(device: str, attention: str, dtype: str = "float32") -> PreTrainedModel:
    """Return a model of two million parameters; equal weights for every attention and dtype."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2", hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=4000, tie_word_embeddings=False, max_position_embeddings=4096,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    nn.Module.to(model, device, torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    model.train()
    return model


def _precision(device: str, dtype: str) -> AbstractContextManager[object]:
    return torch.autocast(device, torch.bfloat16) if dtype == "bfloat16 mixed" else nullcontext()


@torch.no_grad()
def _logits(model: PreTrainedModel, row: PackedSequence) -> list[Tensor]:
    inputs: dict[str, Any] = {"input_ids": row.input_ids, "position_ids": row.position_ids, "use_cache": False}
    return [model(**inputs, **cu_seqlens_of(row)).logits]


@torch.no_grad()
def _alone(model: PreTrainedModel, row: PackedSequence) -> list[Tensor]:
    return [torch.cat([model(document.input_ids, use_cache=False).logits for document in row.documents()], dim=1)]


def _full_logits(model: PreTrainedModel, row: PackedSequence) -> list[Tensor]:
    """Return loss and gradients by way of the logits of every token, documents alone."""
    loss = torch.zeros((), device=row.labels.device)
    for document in row.documents():
        logits = model(document.input_ids, use_cache=False).logits[0, :-1].float()
        loss = loss + F.cross_entropy(logits, document.labels[0, 1:], reduction="sum")
    return _gradients(model, loss)


def _fused(model: PreTrainedModel, row: PackedSequence) -> list[Tensor]:
    head = proven_loss(model)
    assert head.capabilities.has_linear_head, "this architecture ends in one linear layer"
    assert head.capabilities.isolates_documents, "this architecture keeps documents apart"
    return _gradients(model, head(row))


def _gradients(model: PreTrainedModel, loss: Tensor) -> list[Tensor]:
    """Return the loss and the gradients of the head, the embeddings and the first layer's queries."""
    layer = cast("Any", model.base_model).layers[0]
    parts = (model.get_output_embeddings().weight, model.get_input_embeddings().weight, layer.self_attn.q_proj.weight)
    return [loss, *torch.autograd.grad(loss, cast("tuple[Tensor, ...]", parts))]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> int:
    """Run all checks; the exit status tells whether all held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    given = parser.parse_args()
    checks = [*attention_checks(given.device), *model_checks(given.device)]
    if given.json:
        print(json.dumps([{**asdict(check), "ok": check.ok} for check in checks]))
    else:
        rows = [(c.what, c.dtype, f"{c.error:.1e}", f"{c.allowed:.1e}", "ok" if c.ok else "FAILS") for c in checks]
        table(("check", "precision", "error", "allowed", ""), rows)
    return 0 if all(check.ok for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
