"""The loss: the sum of the cross-entropy over trained tokens, computed without the logits of all other tokens.

Logits are the largest tensor of a step (tokens x vocabulary). Only hidden states of trained tokens go through the head,
in chunks. The gradients of a chunk are computed while its logits exist, so there is never more than one chunk of logits
in memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.nn import functional as F
from transformers import PreTrainedModel

from lightning_hub.ops.attention import PACKED, cu_seqlens_of
from lightning_hub.ops.batch import IGNORE_INDEX, PackedSequence

CHUNK = 2048
"""Number of trained tokens whose logits are in memory at a time."""


@dataclass(frozen=True)
class ModelCapabilities:
    """How a model is run; a proof has shown that this gives the right numbers.

    Attributes:
        attention: The attention implementation.
        has_linear_head: Whether the head is one linear layer, so that it is fused with the loss.
        isolates_documents: Whether a packed row is one forward; else each document is one.
        reason: Why packed rows are not one forward.
        adds_to_loss: Whether the loss of the model has terms beside the cross-entropy, such as that of a router.
        max_document_length: If a packed row has a longer document than this, its documents run one by one: the rotary
            embeddings of the model depend on the longest document of a forward. None for no limit.
        is_proven: Whether a miniature was compared; else the model runs with its eager attention.
    """

    attention: str
    has_linear_head: bool
    isolates_documents: bool
    reason: str = ""
    adds_to_loss: bool = False
    max_document_length: int | None = None
    is_proven: bool = True


class CausalLMLoss:
    """Computes the summed loss of the trained tokens of a packed row.

    Most models end in one linear layer; then this head is fused with the loss. Others scale or cap their logits: then
    the model computes them, for the trained tokens only. Most models keep packed documents apart. Others mix tokens
    outside of their attention, or do not pass the boundaries to it: their documents run one by one. A proof decides
    this by comparing numbers, never by the name of the model.

    Args:
        model: A causal language model of transformers.
        label_smoothing: Share of the target that is spread over the whole vocabulary, 0 to 1.
        capabilities: How the model is run.
    """

    def __init__(
        self, model: PreTrainedModel, label_smoothing: float = 0.0, *, capabilities: ModelCapabilities
    ) -> None:
        self.model = model
        self.label_smoothing = label_smoothing
        self.capabilities = capabilities
        if model.config._attn_implementation != self.capabilities.attention:
            model.set_attn_implementation(self.capabilities.attention)
        self._fused: Callable[[PackedSequence], Tensor] = self._fused_loss
        if isinstance(model, FSDPModule):
            # FSDP gathers weights when a registered forward method begins; the fused loss is such a method.
            model.fused_loss = self._fused_loss  # type: ignore[assignment]  # modules are typed to hold tensors
            register_fsdp_forward_method(model, "fused_loss")
            self._fused = cast("Callable[[PackedSequence], Tensor]", model.fused_loss)

    def __call__(self, row: PackedSequence) -> Tensor:
        """Return the summed cross-entropy of the trained tokens of a packed row, a float32 scalar.

        Without trained tokens it is a zero that is still connected to the parameters, so that every rank takes part in
        the all-reduce of gradients.
        """
        if self.capabilities.isolates_documents and self.capabilities.max_document_length is None:
            return self._loss_of_forward(row)
        return torch.stack([self._loss_of_forward(part) for part in self._parts(row)]).sum()

    def _parts(self, row: PackedSequence) -> list[PackedSequence]:
        """Return the packed rows that are one forward each, filled up to the largest number of any rank.

        Every forward gathers sharded weights on all ranks together, so all ranks need the same number of forwards. The
        added ones have no labels.
        """
        parts = forwards_of(row, self.capabilities)
        if isinstance(self.model, FSDPModule):
            most = torch.tensor(len(parts), device=row.input_ids.device)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            shortest = min(row.documents(), key=lambda document: document.num_tokens)
            without_labels = replace(shortest, labels=torch.full_like(shortest.labels, IGNORE_INDEX))
            parts += [without_labels] * (int(most) - len(parts))
        return parts

    def _loss_of_forward(self, row: PackedSequence) -> Tensor:
        """Return the summed loss of one forward: of a packed row, or of one document of it."""
        if self.capabilities.has_linear_head:
            return self._fused(row)
        positions, targets = target_positions(row.labels)
        inputs = inputs_of(self.model, row, self.capabilities.isolates_documents)
        if "logits_to_keep" in _parameters(self.model.__class__.forward):
            logits = self.model(**inputs, logits_to_keep=positions).logits[0]
        else:
            logits = self.model(**inputs).logits[0].index_select(0, positions)
        return _smoothed_cross_entropy(logits.float(), targets, self.label_smoothing)

    def _fused_loss(self, row: PackedSequence) -> Tensor:
        """Return the summed loss of one forward, without computing all logits at once."""
        positions, targets = target_positions(row.labels)
        hidden = self.model.base_model(
            **inputs_of(self.model, row, self.capabilities.isolates_documents)
        ).last_hidden_state
        head = self.model.get_output_embeddings()
        chosen = hidden[0].index_select(0, positions)
        return linear_cross_entropy(chosen, head.weight, head.bias, targets, self.label_smoothing)


def forwards_of(row: PackedSequence, capabilities: ModelCapabilities) -> list[PackedSequence]:
    """Return the packed rows that are one forward each: the row itself, or its documents."""
    if capabilities.isolates_documents and (
        capabilities.max_document_length is None or max(row.lengths) <= capabilities.max_document_length
    ):
        return [row]
    return list(row.documents())


def target_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions whose next token is trained, and these next tokens: int64, both of shape ``(positions,)``.

    Args:
        labels: Labels of a packed row, shape ``(1, tokens)``; documents begin with ``IGNORE_INDEX``.
    """
    targets = labels[0, 1:]
    positions = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    return positions, targets.index_select(0, positions)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Return the summed cross-entropy of ``hidden @ weight.T + bias``, a float32 scalar.

    Args:
        hidden: Hidden states of the positions, shape ``(positions, hidden size)``.
        weight: The head, shape ``(vocabulary, hidden size)``.
        bias: Shape ``(vocabulary,)`` or None.
        targets: Token ids, shape ``(positions,)``.
        label_smoothing: Share of the target that is spread over the vocabulary (Szegedy et al. 2016, section 7).
    """
    return cast("Tensor", _LinearCrossEntropy.apply(hidden, weight, bias, targets, label_smoothing))  # type: ignore[no-untyped-call]


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward, chunk by chunk, while the logits of the chunk exist."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, label_smoothing: float
    ) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wants_bias else None
        cast_weight, cast_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), CHUNK):
                states, labels = hidden[start : start + CHUNK].to(dtype), targets[start : start + CHUNK]
                logits = F.linear(states, cast_weight, cast_bias).float()
                normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
                target_logits = logits.gather(1, labels.unsqueeze(1))
                total += (normaliser - (1 - label_smoothing) * target_logits).sum()
                if label_smoothing:
                    total -= label_smoothing * logits.mean(dim=-1).sum()
                if not (wants_hidden or wants_weight or wants_bias):
                    continue
                grad_logits = logits.sub_(normaliser).exp_()  # softmax minus the target distribution, in place
                if label_smoothing:
                    grad_logits -= label_smoothing / grad_logits.shape[-1]
                grad_logits.scatter_add_(1, labels.unsqueeze(1), torch.full_like(target_logits, label_smoothing - 1))
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(dim=0)
                grad_logits = grad_logits.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + CHUNK] = grad_logits @ cast_weight
                if grad_weight is not None:
                    grad_weight += grad_logits.t() @ states
        ctx.gradients = [grad_hidden, grad_weight, grad_bias]
        ctx.dtypes = [hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype]
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of this loss exist for one backward only")
        scaled = [
            None if gradient is None else gradient.mul_(grad_outputs[0]).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None)


def _smoothed_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Return the summed cross-entropy; ``logits`` has shape ``(positions, vocabulary)``."""
    if len(targets) == 0:
        return logits.sum()
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)


def inputs_of(model: PreTrainedModel, row: PackedSequence, packed: bool = True) -> dict[str, Any]:
    """Return the arguments of a model's forward; never a mask and never a cache, which could ignore the boundaries.

    Args:
        model: The model.
        row: The packed row.
        packed: Whether several documents are one forward. ``PACKED`` gets their boundaries; other attention
            implementations find them from positions that begin at 0 again. A single document needs neither: the
            model computes its positions, which for some models do not begin at 0.
    """
    inputs: dict[str, Any] = {"input_ids": row.input_ids, **accepted_by(model, use_cache=False)}
    if packed:
        inputs["position_ids"] = row.position_ids
        if model.config._attn_implementation == PACKED:
            inputs |= cu_seqlens_of(row)
    return inputs


def accepted_by(model: PreTrainedModel, **options: Any) -> dict[str, Any]:
    """Return those of the options that the forward of a model accepts."""
    known = _parameters(model.__class__.forward)
    return {name: value for name, value in options.items() if name in known or "kwargs" in known}


@cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
