"""Frozen weights in four or eight bits, by bitsandbytes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from lightning_hub.errors import ConfigError
from lightning_hub.methods.lora.adapters import modifies_base
from lightning_hub.models.pretrained import Pretrained

Quantization = Literal["none", "nf4", "int8"]

QUANTIZATION = "model.init_args.quantization"


def check_quantization(kind: Quantization, init: str) -> None:
    """Refuse what cannot be held so, before a model is read.

    Raises:
        ConfigError: There is no bitsandbytes, or the adapters need the weights themselves.
    """
    if kind == "none":
        return
    if find_spec("bitsandbytes") is None:
        remedy = "install lightning-hub[gpu], or leave it out"
        raise ConfigError(f"{kind} weights need the library bitsandbytes", where=QUANTIZATION, remedy=remedy)
    if modifies_base(init):
        message = f"init {init} takes its start out of the weights, which {kind} has rounded"
        raise ConfigError(message, where="model.init_args.init", remedy="leave one of them out")


def load_quantized(
    pretrained: Pretrained, kind: Quantization, dtype: torch.dtype, attn_implementation: str, device: torch.device
) -> PreTrainedModel:
    """Read a model with the linear layers of its blocks quantized; they compute in ``dtype``, as the rest does.

    Raises:
        ConfigError: The model is an adapter on its base, which are merged first.
    """
    if pretrained.base is not None:
        remedy = "merge it with lightning-hub export --merge, and name what that writes"
        raise ConfigError(f"an adapter's folder cannot be read in {kind}", where="model.init_args.model", remedy=remedy)
    config = BitsAndBytesConfig(
        load_in_8bit=kind == "int8",
        load_in_4bit=kind == "nf4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = pretrained.load(
        dtype=dtype, attn_implementation=attn_implementation, quantization_config=config, device=device
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else an evaluation packs the weights for inference on a CPU, and steps after it get no gradients.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # modules are typed to hold tensors
    return model
