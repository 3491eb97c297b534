"""A miniature is small, and has all that the model has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lightning_hub.ops.miniature import NoMiniatureError, build, kinds_of, small_config

LFM2: dict[str, Any] = {"num_hidden_layers": 16, "layer_types": ["conv"] * 14 + ["full_attention"] * 2}


def outline(family: str, **options: Any) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    return model


@pytest.mark.parametrize(
    ("family", "options", "kinds"),
    [
        ("llama", {}, {"LlamaAttention"}),
        ("deepseek_v3", {}, {"DeepseekV3MLP", "DeepseekV3MoE"}),
        ("jamba", {}, {"JambaAttention", "JambaMambaMixer", "JambaSparseMoeBlock"}),
        ("qwen3_next", {}, {"Qwen3NextAttention", "Qwen3NextGatedDeltaNet"}),
        ("gemma3_text", {}, {"Gemma3Attention"}),
        (
            "lfm2",
            {"num_hidden_layers": 16, "layer_types": ["conv"] * 14 + ["full_attention"] * 2},
            {"Lfm2ShortConv", "Lfm2Attention"},
        ),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 28}, {"Qwen2Attention"}),
    ],
)
def test_every_kind_of_module_is_there(family: str, options: dict[str, Any], kinds: set[str]) -> None:
    whole = outline(family, **options)
    before = whole.config.to_dict()
    small = build(type(whole), small_config(type(whole), whole.config), "eager")
    assert kinds_of(whole) <= kinds_of(small)
    assert kinds <= {type(module).__name__ for module in small.modules()}
    assert small.num_parameters() < 1_000_000
    assert whole.num_parameters() > 10 * small.num_parameters()
    assert whole.config.to_dict() == before


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mistral", "sliding_window"),
        ("gemma3_text", "sliding_window"),
        ("llama4_text", "attention_chunk_size"),
        ("gpt_neo", "window_size"),
        ("phi3", "original_max_position_embeddings"),
    ],
)
def test_lengths_are_shorter_than_documents(family: str, name: str) -> None:
    whole = outline(family)
    assert getattr(whole.config, name) > 16
    assert getattr(small_config(type(whole), whole.config), name) <= 8


def test_caps_and_sinks_stay() -> None:
    whole = outline("gemma2")
    small = small_config(type(whole), whole.config)
    assert small.attn_logit_softcapping == whole.config.attn_logit_softcapping
    assert small.final_logit_softcapping == whole.config.final_logit_softcapping


def test_dropout_does_not_stay() -> None:
    whole = outline("gpt2")
    assert whole.config.attn_pdrop > 0
    assert small_config(type(whole), whole.config).attn_pdrop == 0


@pytest.mark.slow
def test_a_small_model_that_lacks_something_is_none() -> None:
    whole = outline("blt")
    with pytest.raises(NoMiniatureError, match="missing"):
        small_config(type(whole), whole.config)
