"""Fused layers such as ``qkv_proj``: finds which of their outputs belong to which part."""

from __future__ import annotations

from typing import cast

from torch import nn
from transformers import PreTrainedModel

from lightning_hub.methods.targets import WeightMatrix

QKV_SIDE_BY_SIDE = ("phi3", "phi4_multimodal")
"""Model types whose ``qkv_proj`` gives all queries, then all keys, then all values; others alternate them by head."""


def output_dim(model: PreTrainedModel, matrix: WeightMatrix) -> int:
    """Return the dim of the outputs in a stored weight: -2, or -1 if the weight is stored as (in, out)."""
    is_transposed = matrix.is_transposed or getattr(model.get_submodule(matrix.module), "is_transposed", False)
    return -1 if is_transposed else -2


def sizes(model: PreTrainedModel, matrix: WeightMatrix) -> list[int]:
    """Return the number of outputs of each part of a weight, in order; one number for a weight that is not fused.

    It knows layouts in which the outputs of each part are contiguous: queries, keys and values of some models, and the
    gate beside the up projection. A weight with alternating parts counts as one.
    """
    layer = model.get_submodule(matrix.module)
    num_outputs = matrix.shape[output_dim(model, matrix)]
    not_fused = [num_outputs]
    leaf = matrix.name.rpartition(".")[2]
    if leaf == "gate_up_proj":
        is_side_by_side = isinstance(layer, nn.Linear) or (
            getattr(layer, "has_gate", False) and getattr(layer, "is_concatenated", False)
        )
        return [num_outputs // 2] * 2 if is_side_by_side else not_fused
    if leaf == "qkv_proj" and model.config.model_type in QKV_SIDE_BY_SIDE:
        return _heads(model, matrix) or not_fused
    if leaf == "c_attn" and model.config.model_type == "gpt2" and num_outputs == 3 * matrix.shape[-2]:
        return [num_outputs // 3] * 3
    return not_fused


def _heads(model: PreTrainedModel, matrix: WeightMatrix) -> list[int] | None:
    """Return the numbers of outputs of queries, keys and values; None if their sum is not that of the weight."""
    config = model.config.get_text_config()
    heads, kv_heads = cast("int", config.num_attention_heads), cast("int", config.num_key_value_heads)
    size = cast("int", getattr(config, "head_dim", None) or config.hidden_size // heads)
    parts = [heads * size, kv_heads * size, kv_heads * size]
    return parts if sum(parts) == matrix.shape[-2] else None
