"""LoRA: what is trained are low-rank adapters; the step, the data and the loss are those of SFT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel

from lightning_hub.errors import ConfigError
from lightning_hub.methods.lora.adapters import (
    Init,
    Settings,
    adapt,
    base_hash,
    describe_adapters,
    is_shifting,
    layers_of,
)
from lightning_hub.methods.sft import SFT
from lightning_hub.ops.loss import Traits


class LoRA(SFT):
    """Low-rank adapters beside frozen layers (Hu et al. 2021, arXiv 2106.09685), through peft.

    Args:
        model: Local folder or hub id of the model to adapt.
        learning_rate: Peak learning rate of AdamW; adapters want about ten times that of full training.
        r: Rank of the adapters.
        alpha: Their strength: outputs are scaled by alpha / r.
        dropout: Share of an adapter's inputs that is left out while training.
        targets: Which layers are adapted: all-linear, or groups (attention, mlp, experts, router), names and regular
            expressions.
        modules_to_save: Modules that are trained whole beside the adapters, as embed_tokens for new tokens.
        use_rslora: Scale by alpha / sqrt(r), which keeps high ranks alive (arXiv 2312.03732).
        use_dora: Train the length of each weight column apart from its direction (arXiv 2402.09353).
        init: What adapters start from; pissa and olora decompose the weights, and the others start at no change.
    """

    def __init__(
        self,
        model: str,
        learning_rate: float = 2e-4,
        r: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        targets: str | list[str] = "all-linear",
        modules_to_save: list[str] | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        init: Init = "default",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, learning_rate, **kwargs)
        if use_dora and is_shifting(init):
            raise ConfigError(
                f"use_dora does not go with init {init}", where="model.init_args.init", remedy="use default"
            )
        self.settings = Settings(r, alpha, dropout, targets, modules_to_save or [], use_rslora, use_dora, init)
        self.adapter_config: LoraConfig | None = None

    def choose_trainable(self, model: PreTrainedModel) -> None:
        """Freeze everything, and put adapters beside the target layers."""
        self.adapter_config = adapt(model, self.settings, self.pretrained.name)
