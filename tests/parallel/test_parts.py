from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_hub.parallel.gathering import full_state
from lightning_hub.parallel.parts import own_part, part_of
from tests.parallel.harness import processes


def cut_and_gather() -> tuple[list[bool], bool]:
    """Cut two layers over 3 x 2 ranks, unevenly, and say whether parts and what is gathered are what they must be."""
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("fsdp", "tp"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 10))
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()}, src_data_rank=None)
    fully_shard(model, mesh=mesh["fsdp"])
    parts = [own_part(cut.detach()).equal(part_of(whole[name], cut)) for name, cut in model.named_parameters()]
    gathered = full_state(model)
    rank_0 = torch.distributed.get_rank() == 0
    return parts, all(gathered[name].equal(whole[name]) for name in whole) if rank_0 else gathered == {}


@pytest.mark.slow
def test_uneven_parts_of_two_axes(tmp_path: Path) -> None:
    assert processes(6, cut_and_gather, tmp_path) == [([True] * 4, True)] * 6
