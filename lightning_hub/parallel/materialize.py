"""Loads a model on several ranks: rank 0 reads the weights, and every rank gets its shards.

Rank 0 loads the weights as a single process would. All ranks build the model on the meta device, shard it with their
strategy, and receive one tensor after another by broadcast; each keeps its local shard. Rank 0 frees a tensor as soon
as it is sent, so a node never needs much more memory than one model. ``set_model_state_dict`` of torch, with
``broadcast_from_rank0``, does not free them.
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
    """Return the sharded model of the strategy, and what ``read`` has found out about the model.

    Args:
        strategy: The trainer's strategy; its process group exists.
        read: Loads the weights, and finds out what needs full weights. Called on rank 0 only.
        skeleton: Builds the same model without weights, from what was found out; called with the meta device as
            default device.

    Raises:
        Exception: The error of ``read``, on every rank, so that no rank waits for ever.
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
    """What all ranks must know about the model that rank 0 has loaded."""

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
    """Set the dtypes of the loaded model: some models keep single layers in float32."""
    names = dict(model.named_parameters())
    assert names.keys() == layout.dtypes.keys(), (
        "the skeleton has the parameters, and the tied weights, of the loaded model"
    )
    for name, parameter in names.items():
        parameter.data = parameter.data.to(layout.dtypes[name])


def _fill(
    model: PreTrainedModel, source: PreTrainedModel | None, layout: _ModelLayout[_T], strategy: HubStrategy
) -> None:
    device, transfer_device = strategy.weights_device, strategy.root_device
    _allocate(model, device)
    loaded = dict(source.named_parameters()) if source is not None else {}
    for name, target in model.named_parameters():
        _fill_parameter(target, loaded.get(name), transfer_device)
    buffers = dict(source.named_buffers()) if source is not None else {}
    for name, (shape, dtype) in layout.buffers.items():
        _set_buffer(model, name, _broadcast(buffers.get(name), shape, dtype, transfer_device).to(device))
    left = [name for name, _ in _on_meta(model)]
    assert not left, f"tensors without values: {left}"


def _fill_parameter(target: nn.Parameter, source: nn.Parameter | None, transfer_device: torch.device) -> None:
    """Broadcast one full tensor, copy the local shard of it, and free the full tensor."""
    full = _broadcast(None if source is None else source.detach(), target.shape, target.dtype, transfer_device)
    local_tensor(target.detach()).copy_(local_shard_of(full, target))
    if source is not None:
        source.data = source.data.new_empty(0)


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Allocate the shards; parameters stay the same objects (swapped in place), so tied weights stay tied."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to_empty(device=device)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def _broadcast(tensor: Tensor | None, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the tensor of rank 0 on every rank, on ``device``, between which the transfer is fast."""
    full = torch.empty(shape, dtype=dtype, device=device) if tensor is None else tensor.to(device).contiguous()
    torch.distributed.broadcast(full, src=0)
    return full


def _set_buffer(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._buffers[leaf] = value


def _on_meta(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that are still on the meta device, also plain attributes of modules."""
    for prefix, module in model.named_modules():
        tensors = {**module._parameters, **module._buffers, **vars(module)}
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor) and tensor.is_meta:
                yield f"{prefix}.{name}", tensor
