"""Model FLOPs of a step, for MFU: the share of the peak of a device that the operations of the model use.

The count is that of NeMo and others, so figures are comparable. For each weight and token, a forward has 2 operations,
and a backward 2 for the gradient of the input and 2 for that of a trained weight. So full training has 6 N operations
for each token, and LoRA about 4 N. Causal attention has the sum of the squares of the lengths of the documents.
Recomputation is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_hub.ops.batch import StepBatch

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "MI300X": 1307e12,
    "RTX 4090": 165e12,
}
"""Dense bfloat16 operations per second from the data sheets, by a substring of the device name."""


def peak_flops(device: torch.device) -> float | None:
    """Return the peak of a device in half precision, in operations per second; None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


@dataclass(frozen=True)
class FlopsCounter:
    """Number of operations of a step of a model, forward and backward.

    Attributes:
        per_token: Operations of all layers but the output layer, for each token.
        per_trained_token: Operations of the output layer, for each trained token: only these have logits.
        per_squared_length: Operations of attention for a document, divided by the square of its length.
    """

    per_token: float
    per_trained_token: float
    per_squared_length: float

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """Count the weights of a model, after its adapters are injected."""
        head = model.get_output_embeddings()
        active = _active_share(model)
        inside = 0.0
        for module in model.modules():
            if module is not head:
                inside += _layer_flops(module)
                inside += sum(
                    active * _flops(parameter.numel(), parameter.requires_grad)
                    for parameter in module.parameters(recurse=False)
                    if parameter.ndim == 3 and not isinstance(module, nn.Linear | nn.Conv1d)
                )
        config = model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", 0) or 0
        width = heads * (getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // max(1, heads))
        layers = getattr(config, "num_hidden_layers", 0) or 0
        return cls(inside, _layer_flops(head) if isinstance(head, nn.Module) else 0.0, 3 * 2.0 * layers * width)

    def of_step(self, step: StepBatch, data_parallel_size: int) -> float:
        """Return the operations of a step over all ranks; documents of other ranks are assumed to have equal lengths.

        Args:
            step: The packed rows of this rank, with the token counts of all ranks.
            data_parallel_size: The data-parallel size.
        """
        squares = sum((end - start) ** 2 for row in step.rows for start, end in pairwise(row.boundaries))
        attention = self.per_squared_length * squares * data_parallel_size
        return self.per_token * step.num_tokens + self.per_trained_token * step.num_trained + attention


def _layer_flops(module: nn.Module) -> float:
    """Return the operations of a linear layer for one token; 0 for anything else."""
    if isinstance(module, nn.Linear):  # not the shape of the weight: quantized and sharded weights have other shapes
        size = module.in_features * module.out_features
    elif isinstance(module, Conv1D):
        size = module.nx * module.nf
    else:
        return 0.0
    return _flops(size, is_parametrized(module) or module.weight.requires_grad)


def _flops(size: int, trains: bool) -> float:
    return (6.0 if trains else 4.0) * size


def _active_share(model: PreTrainedModel) -> float:
    """Return the share of the experts that compute each token."""
    config = model.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / experts if experts and chosen else 1.0
