"""SFT: supervised fine-tuning of all weights."""

from __future__ import annotations

from transformers import PreTrainedModel

from lightning_hub.methods.causal_lm import CausalLMModule


class SFT(CausalLMModule):
    """Full-parameter supervised fine-tuning of a causal language model."""

    def choose_trainable(self, model: PreTrainedModel) -> None:
        """Train every parameter."""
        model.requires_grad_(True)
