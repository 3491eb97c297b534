"""The start of a model on several processes: read once, built everywhere without memory, filled part by part.

Rank 0 reads the weights as one process would. All ranks, it included, build the model on the meta device, cut it as
their strategy says, and receive one tensor after another, of which each keeps its own part. Rank 0 lets go of a
tensor as soon as it is sent, so that the machine never holds much more than one model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_hub.parallel.collectives import Ranks
from lightning_hub.parallel.data_parallel import HubStrategy
from lightning_hub.parallel.dtensor import local_shard_of, local_tensor

_T = TypeVar("_T")


def load_and_shard(
    strategy: Strategy, read: Callable[[], tuple[PreTrainedModel, _T]], skeleton: Callable[[_T], PreTrainedModel]
) -> tuple[PreTrainedModel, _T]:
    """Return the model as the strategy wants it, and what was found out about it.

    Args:
        strategy: The trainer's strategy; its process group exists.
        read: Reads the weights; it also finds out what needs whole weights. Called on rank 0 only.
        skeleton: Builds the same model without reading, from what was found out; called with the meta device as
            default.

    Raises:
        Exception: Whatever ``read`` raised, on every rank: none is left waiting for another.
    """
    if not isinstance(strategy, HubStrategy):
        return read()
    source, layout = _read_once(read)
    with torch.device("meta"):
        model = skeleton(layout.findings)
    _adopt_dtypes(model, layout)
    strategy.parallelize(model)
    _fill(model, source, layout, strategy)
    return model, layout.findings


@dataclass
class _ModelLayout(Generic[_T]):
    """What ranks must know of the model that rank 0 has read."""

    dtypes: dict[str, torch.dtype]
    buffers: dict[str, tuple[torch.Size, torch.dtype]]
    findings: _T


def _read_once(read: Callable[[], tuple[PreTrainedModel, _T]]) -> tuple[PreTrainedModel | None, _ModelLayout[_T]]:
    source: PreTrainedModel | None = None

    def lay_out() -> _ModelLayout[_T]:
        nonlocal source
        source, findings = read()
        dtypes = {name: parameter.dtype for name, parameter in source.named_parameters()}
        buffers = {name: (buffer.shape, buffer.dtype) for name, buffer in source.named_buffers()}
        return _ModelLayout(dtypes, buffers, findings)

    layout = Ranks().run_on_rank_zero(lay_out)
    return source, layout


def _adopt_dtypes(model: PreTrainedModel, layout: _ModelLayout[_T]) -> None:
    """Give the skeleton the dtypes that were read: some models keep single layers in float32."""
    names = dict(model.named_parameters())
    assert names.keys() == layout.dtypes.keys(), "the skeleton has the parameters, and ties, of the model that was read"
    for name, parameter in names.items():
        parameter.data = parameter.data.to(layout.dtypes[name])


def _fill(
    model: PreTrainedModel, source: PreTrainedModel | None, layout: _ModelLayout[_T], strategy: HubStrategy
) -> None:
    device, transfer_device = strategy.weights_device, strategy.root_device
    _allocate(model, device)
    given = dict(source.named_parameters()) if source is not None else {}
    for name, target in model.named_parameters():
        _fill_parameter(target, given.get(name), transfer_device)
    held = dict(source.named_buffers()) if source is not None else {}
    for name, (shape, dtype) in layout.buffers.items():
        _set_buffer(model, name, _broadcast(held.get(name), shape, dtype, transfer_device).to(device))
    left = [name for name, _ in _on_meta(model)]
    assert not left, f"tensors without values: {left}"


def _fill_parameter(target: nn.Parameter, source: nn.Parameter | None, transfer_device: torch.device) -> None:
    """Send one whole tensor, keep the part of it that is this rank's, and let go of the whole."""
    whole = _broadcast(None if source is None else source.detach(), target.shape, target.dtype, transfer_device)
    local_tensor(target.detach()).copy_(local_shard_of(whole, target))
    if source is not None:
        source.data = source.data.new_empty(0)


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Give the parts memory; swapping keeps every parameter the same object, so ties stay tied."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to_empty(device=device)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def _broadcast(tensor: Tensor | None, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return rank 0's tensor on every rank, on the device between which it travels fastest."""
    whole = torch.empty(shape, dtype=dtype, device=device) if tensor is None else tensor.to(device).contiguous()
    torch.distributed.broadcast(whole, src=0)
    return whole


def _set_buffer(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._buffers[leaf] = value


def _on_meta(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors that still have no values, plain attributes of modules included."""
    for prefix, module in model.named_modules():
        held = {**module._parameters, **module._buffers, **vars(module)}
        for name, tensor in held.items():
            if isinstance(tensor, Tensor) and tensor.is_meta:
                yield f"{prefix}.{name}", tensor
