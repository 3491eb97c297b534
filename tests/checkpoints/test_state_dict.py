"""The live tensors of a training: by name on the way out, in place on the way in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from lightning_hub.checkpoints import state_dict
from lightning_hub.checkpoints.checkpoint_io import FolderCheckpointIO
from lightning_hub.errors import ConfigError, HubError


class Tied(nn.Module):
    """Two layers that share a weight, and a buffer that may be there or not."""

    def __init__(self, seed: int, *, has_extra: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("extra", torch.randn(3) if has_extra else None)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.norm(self.embed(ids)))
        return logits


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.tensor([step % 7, 3])).square().mean().backward()
        optimizer.step()


def stored(model: nn.Module, folder: Path, optimizers: list[torch.optim.Optimizer]) -> Any:
    """Write a model and its optimizers, and return what is read of them."""
    state = {
        "global_step": 1,
        "state_dict": state_dict.weights(model),
        "optimizer_states": state_dict.optimizer_state(model, optimizers),
    }
    FolderCheckpointIO().save_together(state, folder / "step-1")
    return FolderCheckpointIO().load_checkpoint(folder / "step-1")["restored"]


def test_tied_weights_are_one_part_under_two_names() -> None:
    parts = state_dict.weights(Tied(0))
    assert parts["embed.weight"] is parts["head.weight"]
    assert set(parts) == {"embed.weight", "head.weight", "norm.weight", "norm.bias"}
    assert (parts["norm.bias"].offsets, parts["norm.bias"].shape) == ((0,), (4,))


def test_weights_are_filled_in_place_and_stay_tied(tmp_path: Path) -> None:
    model, other = Tied(0, has_extra=True), Tied(1)
    places = {name: parameter.data_ptr() for name, parameter in other.named_parameters()}
    state_dict.load_weights(other, stored(model, tmp_path, []).weights)
    assert all(other.state_dict()[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert other.head.weight is other.embed.weight
    assert {name: parameter.data_ptr() for name, parameter in other.named_parameters()} == places
    assert other.state_dict()["extra"] is not None, "a buffer that was not there has got its memory"


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    saved = stored(nn.Sequential(nn.Linear(2, 2)), tmp_path, []).weights
    with pytest.raises(ConfigError, match=r"has 0\.bias, which the model does not have"):
        state_dict.load_weights(Tied(0), saved)
    with pytest.raises(HubError, match="is stored with the shape"):
        state_dict.load_weights(nn.Sequential(nn.Linear(3, 2)), saved)


def test_an_optimizer_goes_on_by_the_names_of_weights(tmp_path: Path) -> None:
    model, other = Tied(0), Tied(1)
    straight = AdamW(model.parameters(), lr=1e-2)
    train(model, straight, 3)
    saved = stored(model, tmp_path, [straight])
    assert "norm.bias/exp_avg" in saved.optimizer.names()
    groups: list[dict[str, Any]] = [{"params": [*other.norm.parameters()][::-1]}, {"params": [other.embed.weight]}]
    resumed = AdamW(groups, lr=1e-2)  # in another order and other groups
    state_dict.load_weights(other, saved.weights)
    state_dict.load_optimizer_state(other, resumed, saved.optimizer)
    train(model, straight, 3)
    train(other, resumed, 3)
    assert all(other.state_dict()[name].equal(tensor) for name, tensor in model.state_dict().items())


def test_an_optimizer_keeps_the_settings_that_it_has(tmp_path: Path) -> None:
    model = Tied(0)
    before = AdamW(model.parameters(), lr=1e-2)
    train(model, before, 1)
    after = AdamW(model.parameters(), lr=5e-4, weight_decay=0.5)
    state_dict.load_optimizer_state(model, after, stored(model, tmp_path, [before]).optimizer)
    assert (after.param_groups[0]["lr"], after.param_groups[0]["weight_decay"]) == (5e-4, 0.5)
    (state, *_) = after.state.values()
    assert float(state["step"]) == 1


def test_a_schedule_stands_where_stepping_would_have_brought_it() -> None:
    def made() -> LambdaLR:
        weights = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
        groups = [{"params": [weights[0]], "lr": 0.1}, {"params": [weights[1]], "lr": 0.2}]
        return LambdaLR(torch.optim.SGD(groups), lambda step: 1 / (1 + step))

    stepped, set_ = made(), made()
    for _ in range(4):
        stepped.optimizer.step()
        stepped.step()
    set_.optimizer.param_groups[0]["lr"] = 17.0  # whatever it was before
    state_dict.set_scheduler_step(set_, 4)
    for _ in range(2):
        assert set_.get_last_lr() == stepped.get_last_lr()
        assert [group["lr"] for group in set_.optimizer.param_groups] == stepped.get_last_lr()
        for one in (stepped, set_):
            one.optimizer.step()
            one.step()
