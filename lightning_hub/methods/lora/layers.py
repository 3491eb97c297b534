"""The forward of adapted layers: float32 adapters compute in the dtype of their layer, and no activation is copied.

peft casts the input of a layer to the dtype of its adapter. Beside a bfloat16 base, a float32 adapter costs a float32
copy of the input of each adapted layer, which autograd keeps until the backward. Here the weights of the adapters,
which are small, are cast instead: they stay float32 masters, and their gradients are summed in float32.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


class AdapterLinear(nn.Linear):
    """One factor of an adapter (``A`` or ``B``), whose weight is cast to the dtype of the input in each forward."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T``; ``input`` has shape ``(..., in_features)`` and any floating dtype."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class FusedLoraLinear(PeftLinear):
    """peft's layer with a forward that adds the adapter's product into the output of the base layer.

    ``W x + s B A x`` is one ``addmm``: one rounding in half precision where peft has three, and no tensor of the size
    of the output but the output itself. Everything else than plain LoRA (merged or
    disabled adapters, DoRA, layers that are sharded for tensor parallelism) uses the forward of peft.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the adapted output, shape ``(..., out_features)``, for an input of shape ``(..., in_features)``."""
        name = self._single_adapter()
        if name is None or args or kwargs or not _has_own_forward(self.lora_A[name], self.lora_B[name]):
            return super().forward(x, *args, **kwargs)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # once, for the base and the adapter
        flat = x.reshape(-1, x.shape[-1])  # an output with two dims is not a view, so it can be changed in place
        output: Tensor = self.base_layer(flat)
        low = self.lora_A[name](self.lora_dropout[name](flat))
        weight = cast("Tensor", self.lora_B[name].weight).to(output.dtype)
        output = output.addmm_(low.to(output.dtype), weight.t(), alpha=self.scaling[name])
        return output.view(*x.shape[:-1], output.shape[-1])

    def _single_adapter(self) -> str | None:
        """Return the one active adapter of a layer with plain LoRA; None if this is not the case."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name: str = self.active_adapters[0]
        is_plain = name in self.lora_A and name not in self.lora_variant and not self.lora_bias[name]
        return name if is_plain else None


def _has_own_forward(*modules: nn.Module) -> bool:
    """Return whether the modules have no hooks: a layer sharded by tensor parallelism must be called as a module."""
    return not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def compute_in_layer_dtype(model: nn.Module) -> None:
    """Let the adapters of a model compute in the dtype of their layers.

    The classes of peft's modules are replaced by subclasses, so names, weights, merging and files stay those of peft.
    """
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        module.cast_input_dtype_enabled = False
        for factor in (*module.lora_A.values(), *module.lora_B.values()):
            if factor.__class__ is nn.Linear:
                factor.__class__ = AdapterLinear
        kind: type = module.__class__
        if kind is PeftLinear and isinstance(module.get_base_layer(), (nn.Linear, Conv1D)):
            cast("PeftLinear", module).__class__ = FusedLoraLinear
