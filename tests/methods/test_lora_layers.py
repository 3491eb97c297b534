"""Adapted layers beside peft's own: the same numbers in float32, no larger errors in bfloat16, less kept memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_hub.methods.lora.adapters import layers_of
from lightning_hub.methods.lora.layers import FusedLoraLinear, compute_in_layer_dtype

INPUTS, OUTPUTS, RANK = 96, 160, 8


class Layers(nn.Module):
    """Two layers one after the other, as a model that peft can adapt."""

    def __init__(self, make: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.first = make(INPUTS, OUTPUTS)
        self.second = make(OUTPUTS, INPUTS)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.second(torch.tanh(self.first(x)))
        return hidden


def linear(inputs: int, outputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs)


def conv(inputs: int, outputs: int) -> nn.Module:
    return Conv1D(outputs, inputs)


def adapted(
    make: Callable[[int, int], nn.Module] = linear, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any
) -> Any:
    """Return layers with adapters of peft that are no zero, of ``dtype`` as their base."""
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=12, target_modules=["first", "second"], init_lora_weights=False,
                        fan_in_fan_out=make is conv, **options)  # fmt: skip
    return get_peft_model(Layers(make), config).to(dtype)


def with_masters(model: Any) -> Any:
    """Return a copy as it is trained here: float32 adapters that compute in the dtype of their layer."""
    ours = copy.deepcopy(model)
    for parameter in ours.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    compute_in_layer_dtype(ours)
    assert any(isinstance(module, FusedLoraLinear) for module in ours.modules())
    return ours


def numbers(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Return the output for ``x`` and the gradients of a fixed sum of it, by name."""
    torch.manual_seed(1)  # dropout
    x = x.detach().clone().requires_grad_()
    output = model(x)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (output * weights.to(output.dtype)).sum().backward()
    assert x.grad is not None
    found = {"output": output.detach(), "input": x.grad}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth.double()).norm()) / float(truth.double().norm())


def some_input(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, INPUTS, generator=torch.Generator().manual_seed(3)).to(dtype)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"lora_dropout": 0.3},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "conv": {"make": conv},
}


@pytest.mark.parametrize("shape", [(2, 11), (13,)], ids=["batched", "flat"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_in_float32_the_numbers_are_those_of_peft(variant: str, shape: tuple[int, ...]) -> None:
    model = adapted(**VARIANTS[variant])
    truth, found = numbers(model, some_input(*shape)), numbers(with_masters(model), some_input(*shape))
    assert found.keys() == truth.keys()
    for name, tensor in truth.items():
        assert error(found[name], tensor) < 2e-6, name


def add_errors(into: dict[str, float], found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Add squared relative errors, by name: one draw of roundings says little, the sum of several does."""
    for name, tensor in found.items():
        into[name] = into.get(name, 0.0) + error(tensor, truth[name]) ** 2


def largest_ratio(ours: dict[str, float], theirs: dict[str, float]) -> float:
    return math.sqrt(max(square / theirs[name] for name, square in ours.items()))


@pytest.mark.parametrize("variant", ["plain", "rslora", "dora", "conv"])
def test_in_bfloat16_the_error_is_not_larger_than_that_of_bfloat16_adapters(variant: str) -> None:
    theirs: dict[str, float] = {}
    ours: dict[str, float] = {}
    for seed in range(8):
        peft = adapted(dtype=torch.bfloat16, seed=seed, **VARIANTS[variant])
        x = some_input(4, 64, dtype=torch.bfloat16)
        truth = numbers(copy.deepcopy(peft).double(), x.double())
        found = numbers(with_masters(peft), x)
        assert all(tensor.dtype == (torch.float32 if "lora_" in name else x.dtype) for name, tensor in found.items())
        add_errors(ours, found, truth)
        add_errors(theirs, numbers(peft, x), truth)
    assert largest_ratio(ours, theirs) <= 1.02


@pytest.mark.parametrize("variant", ["plain", "dora"])
def test_under_autocast_too(variant: str) -> None:
    theirs: dict[str, float] = {}
    ours: dict[str, float] = {}
    for seed in range(8):
        peft = adapted(seed=seed, **VARIANTS[variant])
        truth = copy.deepcopy(peft).double()
        right, masters = numbers(truth, some_input(4, 64).double()), with_masters(peft)
        for _, layer in layers_of(peft):
            layer.cast_input_dtype_enabled = False  # as bfloat16 would have it
        with torch.autocast("cpu", torch.bfloat16):
            for model, into in ((peft, theirs), (masters, ours)):
                add_errors(into, numbers(model, some_input(4, 64)), right)
    assert largest_ratio(ours, theirs) <= 1.02


def kept_bytes(model: Any, x: Tensor) -> int:
    """Return the bytes that autograd keeps from forward to backward, each storage once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x)
    return sum(kept.values())


@pytest.mark.parametrize(("variant", "saved"), [("plain", 0.8), ("dora", 0.8), ("dropout", 0.4)])
def test_no_activation_is_kept_in_float32(variant: str, saved: float) -> None:
    tokens = 4096
    peft = adapted(dtype=torch.bfloat16, **VARIANTS[variant])
    x = some_input(tokens, dtype=torch.bfloat16).requires_grad_()
    ours, theirs = kept_bytes(with_masters(peft), x), kept_bytes(peft, x)
    small = 2 * (RANK * (INPUTS + OUTPUTS) * 2 + 4 * OUTPUTS)  # casts of the adapters
    if variant == "dora":
        small += 2 * 4 * OUTPUTS * INPUTS  # norms of the weights, in float32
    assert ours <= theirs + small
    # What float32 adapters of peft keep: a float32 copy of the input of each layer (instead of one in bfloat16).
    masters = copy.deepcopy(peft)
    for parameter in masters.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    assert kept_bytes(masters, x) >= ours + 4 * tokens * (INPUTS + OUTPUTS) * saved


def test_merged_and_disabled_adapters_take_pefts_way() -> None:
    ours = with_masters(adapted())
    x = some_input(5)
    expected = ours(x)
    with ours.disable_adapter():
        assert not torch.allclose(ours(x), expected, atol=1e-3)
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)
    ours.unmerge_adapter()
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)


def test_a_hook_on_an_adapter_is_called() -> None:
    ours = with_masters(adapted())
    layer = next(module for module in ours.modules() if isinstance(module, PeftLinear))
    seen: list[Tensor] = []
    layer.lora_B["default"].register_forward_hook(lambda module, given, output: seen.append(output))
    ours(some_input(5))
    assert len(seen) == 1
