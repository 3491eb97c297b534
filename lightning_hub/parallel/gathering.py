"""Whole weights from parts, one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole weights of a model on rank 0 and nothing elsewhere; every rank must call this."""
    return full_tensors(model.state_dict(keep_vars=True))  # tied weights are one parameter under two names


def full_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole tensors on rank 0 and nothing elsewhere; every rank must call this.

    One tensor is whole at a time, so no rank but rank 0 ever holds more than its own part and one tensor. Tied
    weights are gathered once and share memory again. They lie on the host; where nothing is cut and the model lies
    there too, they are the model's own.
    """
    keeps = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    gathered: dict[int, Tensor] = {}
    for tensor in state.values():
        if id(tensor) not in gathered:
            whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()
            gathered[id(tensor)] = whole if keeps else whole.new_empty(0)
    return {name: gathered[id(tensor)] for name, tensor in state.items()} if keeps else {}
