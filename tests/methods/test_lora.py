"""LoRA beside peft itself: the same training, folders that peft reads, and merges that are the same model."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from lightning_hub.ops.loss import LossHead
from tests.parallel.harness import plan

SMALL: dict[str, Any] = {"r": 4, "alpha": 8.0, "learning_rate": 1e-2, "lr_scheduler": "constant"}


def peft_loop(model: PreTrainedModel, config: LoraConfig) -> tuple[list[float], dict[str, Tensor]]:
    """Train the same rows with peft, AdamW and a loop that anyone would write."""
    torch.manual_seed(0)
    adapted = get_peft_model(model, config)
    loss_of = LossHead(adapted.get_base_model())
    optimizer = torch.optim.AdamW(
        [p for p in adapted.parameters() if p.requires_grad], 1e-2, (0.9, 0.95), weight_decay=0
    )
    losses = []
    for index in range(len(plan())):
        rows, num_trained = plan().step(0, index)
        optimizer.zero_grad()
        loss = torch.stack([loss_of(row) for row in rows]).sum() / num_trained
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in adapted.named_parameters() if p.requires_grad}
