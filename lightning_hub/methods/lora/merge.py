"""Merges an adapter folder and its base model into a plain model, and reports what the cast loses."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from lightning_hub.checkpoints.export import write_export
from lightning_hub.errors import HubError
from lightning_hub.methods.cast_error import CastError
from lightning_hub.methods.lora.adapter_io import check_answers, probe_logits
from lightning_hub.methods.lora.adapters import layers_of
from lightning_hub.models.pretrained import Pretrained


def _weight(layer: LoraLayer) -> Tensor:
    """Return the weight that an adapter layer adapts."""
    if isinstance(layer, ParamWrapper):
        weight: Tensor = layer.get_param()  # type: ignore[no-untyped-call]
        return weight.detach()
    return cast("Tensor", layer.get_base_layer().weight).detach()


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters only: buffers, such as rotary frequencies, need their precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def write_merged(
    target: Path, folder: Path, base: Pretrained, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> str:
    """Merge an adapter into its base in float32, cast, write a plain model folder, and check it by reading it again.

    Args:
        target: The folder to write.
        folder: The folder of the adapter.
        base: The base model.
        tokenizer: The tokenizer that made the training data, with its chat template.
        dtype: The dtype of the written weights.

    Returns:
        Lines about what the cast to bfloat16, and to ``dtype``, loses of the change.

    Raises:
        HubError: The written model gives other logits than the base model with the adapter.
    """
    loaded = base.load(dtype=torch.float32, attn_implementation="eager")
    names = set(loaded.state_dict())
    adapted = PeftModel.from_pretrained(loaded, str(folder))
    expected = probe_logits(adapted)
    cast_errors = [CastError(found) for found in dict.fromkeys((torch.bfloat16, dtype))]
    for _, layer in layers_of(adapted):
        before = _weight(layer).clone()
        layer.merge(safe_merge=True)
        end = _weight(layer)
        for cast_error in cast_errors:
            cast_error.add(before, end - before, end)
    merged = adapted.unload()
    check_answers(probe_logits(merged), expected, folder)
    _cast(merged, dtype)
    weights = merged.state_dict()
    if weights.keys() != names:
        raise HubError(f"merging has changed the names of weights: {min(weights.keys() ^ names)}", where=str(folder))
    write_export(target, merged, weights, tokenizer)
    _cast(merged, torch.float32)
    again = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, attn_implementation="eager")
    check_answers(probe_logits(again), probe_logits(merged), target)
    return "\n".join(f"merge  {cast_error.describe()}" for cast_error in cast_errors)
