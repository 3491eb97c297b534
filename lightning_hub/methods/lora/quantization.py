"""Quantizes frozen weights to 4 or 8 bits with bitsandbytes."""

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
    """Check before a model is loaded that it can be quantized.

    Raises:
        ConfigError: bitsandbytes is missing, or the init of the adapters changes the base weights.
    """
    if kind == "none":
        return
    if find_spec("bitsandbytes") is None:
        remedy = "install lightning-hub[gpu], or set quantization: none"
        raise ConfigError(f"{kind} weights need the library bitsandbytes", where=QUANTIZATION, remedy=remedy)
    if modifies_base(init):
        message = f"init {init} changes the base weights, which {kind} has rounded"
        raise ConfigError(message, where="model.init_args.init", remedy="remove one of them")


def load_quantized(
    pretrained: Pretrained, kind: Quantization, dtype: torch.dtype, attn_implementation: str, device: torch.device
) -> PreTrainedModel:
    """Load a model with the linear layers of its blocks quantized; they compute in ``dtype``, like all others.

    Raises:
        ConfigError: The model is an adapter with its base model: these must be merged first.
    """
    if pretrained.base is not None:
        remedy = "merge it with lightning-hub export --merge, and name the folder that this writes"
        raise ConfigError(
            f"an adapter folder cannot be quantized ({kind})", where="model.init_args.model", remedy=remedy
        )
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
            # With the default, an evaluation packs the weights for CPU inference, and later steps get no gradients.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # modules are typed to hold tensors
    return model
