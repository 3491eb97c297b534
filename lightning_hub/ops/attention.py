"""Attention over packed documents: the fastest exact implementation of each device, under one name.

The cost of a dense block-diagonal mask is the square of the length of the packed row; here it is the sum of the squares
of the lengths of the documents. On a CPU every document is one call of the fused attention of PyTorch; on CUDA the
complete packed row is one call of ``varlen_attn``. The function is registered with transformers under ``PACKED``, so
models need no change: transformers builds no mask for a name without a mask function, and passes the boundaries of the
documents as keyword arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import TypedDict, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from lightning_hub.ops.batch import PackedSequence

PACKED = "packed_documents"
"""The attention name under which transformers finds this implementation."""


class BoundariesLostError(RuntimeError):
    """A model does not pass the boundaries of the documents to its attention layers."""


class SequenceBoundaries(TypedDict):
    """Keyword arguments that a model passes to its attention layers: the boundaries of the documents."""

    boundaries: tuple[int, ...]
    packed_cu_seqlens: Tensor | None


def cu_seqlens_of(row: PackedSequence) -> SequenceBoundaries:
    """Return the boundaries of ``row``; on CUDA also as an int32 tensor of shape ``(documents + 1,)``."""
    device = row.input_ids.device
    cumulative = torch.tensor(row.boundaries, dtype=torch.int32, device=device) if device.type == "cuda" else None
    return SequenceBoundaries(boundaries=row.boundaries, packed_cu_seqlens=cumulative)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    boundaries: tuple[int, ...] | None = None,
    packed_cu_seqlens: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: object,
) -> tuple[Tensor, None]:
    """Attend causally inside each document of a packed row.

    Args:
        module: The attention layer (part of the interface of transformers).
        query: Shape ``(1, heads, tokens, head size)``.
        key: Shape ``(1, key-value heads, tokens, head size)``; as many heads as ``query`` or a divisor of them.
        value: The same shape as ``key``, but perhaps another head size.
        attention_mask: Must be None: a mask could ignore the boundaries, or cost the square of the length.
        scaling: Factor of the scores; the inverse root of the head size if None.
        dropout: Probability of dropping an attention weight.
        boundaries: Document boundaries ``(0, ..., tokens)``.
        packed_cu_seqlens: The same boundaries as an int32 tensor on the device of the query (CUDA only). The name is
            not ``cu_seqlens``, because layers of linear attention have an argument of that name.
        sliding_window: How many tokens a query attends to, itself included.
        softcap: Scores become ``softcap * tanh(score / softcap)`` (Gemma 2).
        s_aux: One learned sink for each head, a further logit of the softmax (gpt-oss), shape ``(heads,)``.
        unused: Other arguments of models, such as position ids.

    Returns:
        The output, shape ``(1, tokens, heads, head size)``, and None in place of the attention weights.

    Raises:
        BoundariesLostError: The model passed no boundaries; the row is then not treated as one document.
    """
    if attention_mask is not None:
        raise ValueError("packed rows do not take an attention mask: use the boundaries of the documents")
    if boundaries is None:
        raise BoundariesLostError("the model does not pass keyword arguments to its attention layers")
    # Rotary embeddings return float32 under autocast, and the kernels need one dtype.
    query, key, value = _in_compute_dtype(query, key, value)
    # The fused kernel computes plain softmax attention only: no cap, no sinks, no dropout.
    plain = softcap is None and s_aux is None and dropout == 0.0
    if plain and packed_cu_seqlens is not None and _fits_varlen(query, value, sliding_window):
        return _varlen_attention(query, key, value, scaling, packed_cu_seqlens, boundaries, sliding_window), None
    # Else one call for each document: a slice of the tokens contains no other document, so causal attention in it needs
    # no mask. A window that is at least as long as the document has no effect and is left out, because a window needs
    # a mask and a slower kernel.
    parts = [
        _document_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            scaling=scaling,
            dropout=dropout,
            window=sliding_window if sliding_window and sliding_window < end - start else None,
            softcap=softcap,
            sinks=s_aux,
        )
        for start, end in pairwise(boundaries)
    ]
    # (1, heads, length, size) -> (1, length, heads, size), concatenated to all tokens. The result is contiguous, like
    # that of transformers: some models use a view of it in another shape.
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1), None


def _in_compute_dtype(*states: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the dtype of autocast, if it is enabled; shapes do not change."""
    device = states[0].device.type
    if not torch.is_autocast_enabled(device):
        return states
    return tuple(state.to(torch.get_autocast_dtype(device)) for state in states)


def _document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return causal attention of one document, shape ``(1, heads, length, head size)``; fused where possible."""
    grouped = key.shape[1] != query.shape[1]
    if softcap is None and sinks is None:
        mask = None if window is None else _band(query.shape[2], window, query.device)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling,
            enable_gqa=grouped,
        )  # fmt: skip
    if grouped:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = query @ key.transpose(-1, -2) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    length = query.shape[2]
    scores = scores.masked_fill(~_band(length, window or length, query.device), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(1, -1, length, 1).to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)[..., :length]
    return F.dropout(weights, dropout) @ value


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Return the boolean mask of shape ``(length, length)`` that is true where a query attends to a key."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


@cache
def _varlen() -> Callable[..., Tensor] | None:
    """Return ``varlen_attn``, or None if this version of torch does not have it."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # 0.1 s; only for CUDA, and not in older torch
    except ImportError:
        return None
    return cast("Callable[..., Tensor]", varlen_attn)


def _fits_varlen(query: Tensor, value: Tensor, window: int | None) -> bool:
    """Return whether FlashAttention supports these tensors: half precision, equal head sizes, Ampere or newer."""
    kernel, size = _varlen(), query.shape[-1]
    return (
        kernel is not None
        and (window is None or "window_size" in inspect.signature(kernel).parameters)
        and query.dtype in (torch.float16, torch.bfloat16)
        and size == value.shape[-1]
        and size % 8 == 0
        and size <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    cu_seqlens: Tensor,
    boundaries: tuple[int, ...],
    window: int | None,
) -> Tensor:
    """Attend with one kernel over the packed row; its signature differs between releases, so it is inspected."""
    kernel = _varlen()
    assert kernel is not None, "_fits_varlen has checked this"
    known = inspect.signature(kernel).parameters
    options: dict[str, object] = {"scale": scaling} if "scale" in known else {}
    if "window_size" in known:
        options["window_size"] = (window - 1 if window else -1, 0)
    else:
        options["is_causal"] = True
    if key.shape[1] != query.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    if "scale" not in known and scaling is not None:
        query = query * (scaling * query.shape[-1] ** 0.5)
    longest = max(end - start for start, end in pairwise(boundaries))
    flat = [states[0].transpose(0, 1).contiguous() for states in (query, key, value)]
    return kernel(*flat, cu_seqlens, cu_seqlens, longest, longest, **options).unsqueeze(0)


AttentionInterface.register(PACKED, packed_attention)
