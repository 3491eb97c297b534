"""A short fingerprint of a tensor, equal for float32 and bfloat16 copies of the same weights."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_PROBED = 64
"""How many elements of a tensor its fingerprint contains."""


def tensor_fingerprint(tensor: Tensor) -> bytes:
    """Return the bytes of up to 64 evenly spaced elements of a tensor, rounded to bfloat16."""
    flat = tensor.detach().reshape(-1)
    positions = torch.linspace(0, max(0, flat.numel() - 1), min(NUM_PROBED, flat.numel()), dtype=torch.float64).long()
    sample = flat[positions.to(flat.device)].to(torch.bfloat16).cpu()
    return sample.view(torch.int16).numpy().tobytes()
