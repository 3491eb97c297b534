"""The sizes of a miniature, by the names of sizes in configurations of transformers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

VOCABULARY = 96
HIDDEN = 64
NUM_HEADS = 4
HEAD_DIM = 16
EXPERTS = 8
REACH = 4
"""Tokens of a window or a chunk in a miniature."""

Config = dict[str, Any]
Size = int | Callable[[int, Config], int]


def _kv_heads(value: int, config: Config) -> int:
    """Keep whether there is one key-value head, as many as query heads, or a number between (grouped queries)."""
    names = ("num_attention_heads", "n_heads", "n_head", "num_heads", "swa_num_attention_heads")
    heads = {config[name] for name in names if config.get(name)}
    return 1 if value == 1 else NUM_HEADS if value in heads else NUM_HEADS // 2


def _at_most(limit: int) -> Callable[[int, Config], int]:
    return lambda value, _: min(value, limit)


def _head_dim(value: int, config: Config) -> int:
    """Return the head size; in some models the name means the rotated part of a head, or the sum of both parts."""
    if value == config.get("qk_rope_head_dim"):
        return HEAD_DIM // 2
    layers = [config, *(config.get("per_layer_config") or {}).values()]
    sums = {
        (layer.get("qk_nope_head_dim") or 0) + (layer.get("qk_rope_head_dim", config.get("qk_rope_head_dim")) or 0)
        for layer in layers
        if "qk_nope_head_dim" in config
    }
    return HEAD_DIM * 3 // 2 if value in sums else HEAD_DIM


def _of_hidden(value: int, config: Config) -> int:
    """Keep the ratio of a width to the hidden size of the model."""
    hidden = next((config[name] for name in ("hidden_size", "d_model", "n_embd") if config.get(name)), 0)
    if hidden and value < hidden:
        return HIDDEN // 2
    return HIDDEN * (value // hidden) if hidden and value % hidden == 0 else HIDDEN


def _linear_key_heads(value: int, config: Config) -> int:
    return NUM_HEADS if value == config.get("linear_num_value_heads", value) else NUM_HEADS // 2


def _heads(_: int, config: Config) -> int:
    """Return the number of heads; in Mamba 2 it is that of the expanded state."""
    return HIDDEN * config["expand"] // HEAD_DIM if "expand" in config else NUM_HEADS


def _positions(value: int, config: Config) -> int:
    """Return the number of positions: few for dynamic rotary embeddings, which change for longer documents."""
    return min(value, REACH * 2 if "'dynamic'" in str(config.get("rope_parameters")) else 128)


def _wide_head_dim(_: int, config: Config) -> int:
    return HIDDEN * 2 // NUM_HEADS if "attention_hidden_size" in config else HEAD_DIM


SIZES: tuple[tuple[str, Size], ...] = (
    (r"(.*_)?type_vocab_size|pad_vocab_size_multiple|make_ngram_.*", _at_most(8)),
    (r"(.*_)?vocab_size(_.*)?|ngram_vocab_size_base|vocab_offset|encoder_hash_byte_group_vocab", VOCABULARY),
    (r"(word_embed_proj_dim|hidden_size|d_model|n_embd|emb_dim|embedding_dim|embedding_size|lru_width|attention_hidden_size|hidden_size_global"
     r"|.*_hidden_size|.*embedding_size)", _of_hidden),
    (r"num_attention_heads|n_heads?|num_heads|attention_heads|.*_attention_heads|linear_num_heads", _heads),
    (r"linear_num_key_heads", _linear_key_heads),
    (r"linear_num_value_heads", NUM_HEADS),
    (r"n_mamba_heads", _at_most(2)),
    (r"(.*_)?num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups", _kv_heads),
    (r"attention_head_dim", _wide_head_dim),
    (r"qk_nope_head_dim|v_head_dim", HEAD_DIM),
    (r"qk_head_dim", HEAD_DIM * 3 // 2),
    (r"qk_rope_head_dim|rotary_dim", HEAD_DIM // 2),
    (r"head_dim|d_head|dim_head|attention_head_size|d_kv|.*_head_dim|kv_channels|head_size", _head_dim),
    (r".*intermediate_size.*|.*ffn_(hidden_size|dim)|d_ff|dff|dim_ff|feed_forward_size|d_inner", _of_hidden),
    (r".*_lora_rank|.*_rank", _at_most(HEAD_DIM)),
    (r"n_routed_experts|(.*_)?num_(local_)?experts|zero_expert_num", _at_most(EXPERTS)),
    (r"num_experts_per_tok(en)?|moe_(top)?_?k|top_k_experts", _at_most(2)),
    (r"n_group|num_expert_group", _at_most(2)),
    (r"topk_group", _at_most(1)),
    (r"(?!max_window_layers|max_inference_chunksize|.*_pattern|.*window_every).*(window|chunk)(_size|_len|_length|size|$)|.*chunk_size"
     r"|block_size|index_(topk|block_size|topk_blocks)|rel_extent|.*max_distance|local_attention|.*_n_floor"
     r"|floor_scale", _at_most(REACH)),
    (r"original_max_position_embeddings", _at_most(REACH * 2)),
    (r"max_position_embeddings", _positions),
    (r"n_positions|n_ctx|max_seq_len|max_(source|target)_positions|context_length"
     r"|model_max_length|num_position_embeddings", _at_most(128)),
    (r"mamba_d_state|ssm_state_size|state_size|.*_size_per_layer_input", _at_most(HEAD_DIM)),
    (r"mamba_n_heads|mamba_num_heads", NUM_HEADS * 2),
    (r"mamba_d_head|mamba_head_dim", HEAD_DIM),
    (r"mamba_headdim", HIDDEN),
    (r"n_groups|mamba_n_groups|mamba_ngroups", _at_most(2)),
    (r"mamba_d_ssm", HIDDEN * 2),
)  # fmt: skip
"""Patterns for complete names of sizes, and their sizes in a miniature; the first match is used."""


def small_size(name: str, value: int, config: Config) -> int:
    """Return the size in a miniature; a number that is not a size does not change.

    Args:
        name: Its name in the configuration.
        value: The size.
        config: The configuration: some sizes depend on others.
    """
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            return size if isinstance(size, int) else size(value, config)
    return value
