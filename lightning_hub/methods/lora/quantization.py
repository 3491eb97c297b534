"""Frozen weights in four or eight bits, by bitsandbytes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from lightning_hub.errors import ConfigError
from lightning_hub.models.pretrained import Pretrained

Quantization = Literal["none", "nf4", "int8"]

QUANTIZATION = "model.init_args.quantization"


def check_quantization(kind: Quantization) -> None:
    """Refuse what this machine cannot hold, before a model is read.

    Raises:
        ConfigError: There is no bitsandbytes, or no GPU.
    """
    if kind == "none":
        return
    if find_spec("bitsandbytes") is None:
        remedy = "install lightning-hub[gpu], or leave it out"
        raise ConfigError(f"{kind} weights need the library bitsandbytes", where=QUANTIZATION, remedy=remedy)
    if not torch.cuda.is_available():
        raise ConfigError(f"{kind} weights need a GPU, and there is none", where=QUANTIZATION, remedy="leave it out")


def load_quantized(
    pretrained: Pretrained, kind: Quantization, dtype: torch.dtype, attn_implementation: str
) -> PreTrainedModel:
    """Read a model with the linear layers of its blocks quantized; they compute in ``dtype``."""
    config = BitsAndBytesConfig(
        load_in_8bit=kind == "int8",
        load_in_4bit=kind == "nf4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return pretrained.load(dtype=dtype, attn_implementation=attn_implementation, quantization_config=config)
