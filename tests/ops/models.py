"""Tiny random models of several families, for tests of numbers."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 61
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral, sliding window": MistralConfig(**SHAPE, sliding_window=4),
    "qwen2": Qwen2Config(**{key: value for key, value in SHAPE.items() if key != "head_dim"}),
    "qwen3": Qwen3Config(**SHAPE),
    "gemma2, caps and sliding window": Gemma2Config(**SHAPE, sliding_window=4, attn_logit_softcapping=0.1),
    "gemma3, sliding window": Gemma3TextConfig(**SHAPE, sliding_window=4),
    "granite, scaled logits": GraniteConfig(**SHAPE, logits_scaling=3.0),
    "cohere, scaled logits": CohereConfig(
        **{key: value for key, value in SHAPE.items() if key != "head_dim"}, logit_scale=0.3
    ),
    "gpt-oss, sinks": GptOssConfig(**SHAPE, sliding_window=4, num_local_experts=2, num_experts_per_tok=2),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
}


LEAKING: dict[str, PretrainedConfig] = {
    "bloom, positions in its mask": BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0
    ),
    "llama 4, chunks": Llama4TextConfig(
        **SHAPE,
        intermediate_size_mlp=48,
        num_local_experts=2,
        num_experts_per_tok=1,
        attention_chunk_size=4,
        interleave_moe_layer_step=2,
    ),
    "lfm2, convolutions": Lfm2Config(
        **{key: value for key, value in SHAPE.items() if key != "head_dim"}, layer_types=["conv", "full_attention"]
    ),
    "jamba, states": JambaConfig(
        **{key: value for key, value in SHAPE.items() if key != "head_dim"},
        use_mamba_kernels=False,
        mamba_d_state=4,
        mamba_d_conv=2,
        mamba_expand=2,
        mamba_dt_rank=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
    ),
}
"""Models that let the documents of a packed row see each other, or lose their mask, under our attention."""


def make(family: str, attention: str, seed: int = 0) -> PreTrainedModel:
    """Return a random model; equal arguments but for the attention give equal weights."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        deepcopy({**CONFIGS, **LEAKING}[family]), attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # sinks, norms and biases start at constants
    model.set_attn_implementation(attention)
    return model


def documents(*lengths: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return documents of random ids in which about half of the tokens are trained."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        labels = ids.where(torch.rand(length, generator=generator) < 0.5, -100)
        labels[-1] = ids[-1]
        made.append((ids, labels))
    return made
