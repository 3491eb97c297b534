from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_hub.checkpoints import state_dict
from lightning_hub.checkpoints.checkpoint_io import FolderCheckpointIO
from lightning_hub.parallel.dtensor import full_state_dict, local_shard_of, local_tensor
from tests.parallel.multiprocess import processes


def cut_and_gather(folder: Path) -> tuple[list[bool], bool, list[bool]]:
    """Cut two layers over 3 x 2 ranks, unevenly.

    Returns:
        Whether parts, what is gathered, and what is saved by all and filled again are what they must be.
    """
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("fsdp", "tp"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 10))
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()}, src_data_rank=None)
    fully_shard(model, mesh=mesh["fsdp"])
    parts = [
        local_tensor(cut.detach()).equal(local_shard_of(whole[name], cut)) for name, cut in model.named_parameters()
    ]
    gathered = full_state_dict(model)
    rank_0 = torch.distributed.get_rank() == 0
    found = all(gathered[name].equal(whole[name]) for name in whole) if rank_0 else gathered == {}
    FolderCheckpointIO().save_together({"global_step": 1, "state_dict": state_dict.weights(model)}, folder / "step-1")
    stored = FolderCheckpointIO().load_checkpoint(folder / "step-1")["restored"].weights
    again = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 10))
    state_dict.load_weights(again, stored)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    state_dict.load_weights(model, stored)
    filled = [
        local_tensor(cut.detach()).equal(local_shard_of(whole[name], cut)) for name, cut in model.named_parameters()
    ]
    return parts, found, filled + [again.state_dict()[name].equal(tensor) for name, tensor in whole.items()]


@pytest.mark.slow
def test_uneven_parts_of_two_axes(tmp_path: Path) -> None:
    assert processes(6, partial(cut_and_gather, tmp_path), tmp_path) == [([True] * 4, True, [True] * 8)] * 6
