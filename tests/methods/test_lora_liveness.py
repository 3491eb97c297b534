"""Adapters that do not learn are named, and those that only wait for their tokens are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig

from lightning_hub.errors import HubError
from lightning_hub.methods.lora import LoRA
from lightning_hub.methods.lora.liveness import AdapterUpdateCheck, DeadAdapterError
from lightning_hub.models.pretrained import Pretrained
from lightning_hub.ops.batch import StepBatch
from tests.methods.test_lora import SMALL
from tests.ops.models import SHAPE
from tests.parallel.multiprocess import Case, trained
from tests.parallel.test_topology import ONE


def frozen_at_the_start(module: LoRA, step: int) -> None:
    if step == 0:
        module.get_parameter("model.model.layers.1.self_attn.k_proj.lora_B.default.weight").requires_grad_(False)


def without_gradient(module: LoRA, step: int) -> None:
    module.get_parameter("model.model.layers.1.mlp.up_proj.lora_A.default.weight").grad = None


def not_in_the_optimizer(module: LoRA, step: int) -> None:
    if step == 0:
        del module.trainer.optimizers[0].param_groups[0]["params"][3]


@pytest.mark.parametrize(
    ("harm", "hook", "parts"),
    [
        (frozen_at_the_start, "on_train_start", ["1 of 42", "are now frozen", "layers.1.self_attn.k_proj.lora_B"]),
        (not_in_the_optimizer, "on_train_start", ["1 of 42", "in no optimizer", "layers.0.self_attn.k_proj.lora_B"]),
        (without_gradient, "on_before_optimizer_step", ["have not changed in 2 steps", "layers.1.mlp.up_proj.lora_A"]),
    ],
)
def test_a_dead_adapter_is_named(harm: Callable[[LoRA, int], None], hook: str, parts: list[str]) -> None:
    class Harmed(LoRA):
        pass

    def harmed(self: LoRA, *args: Any) -> None:
        if hook == "on_train_start":
            getattr(LoRA, hook)(self, *args)
        harm(self, self.trainer.global_step)
        if hook == "on_train_start":
            assert self.update_check is not None
            self.update_check.check(self.trainer.optimizers)
        else:
            getattr(LoRA, hook)(self, *args)

    setattr(Harmed, hook, harmed)
    with pytest.raises(DeadAdapterError) as dead:
        trained(Case("lora", method=Harmed, options=SMALL), ONE)
    assert all(part in str(dead.value) for part in parts), dead.value


@pytest.mark.slow
def test_a_warm_up_from_zero_raises_no_alarm() -> None:
    options = {**SMALL, "warmup_steps": 4, "learning_rate": 1e-4}
    seen = trained(Case("lora", method=LoRA, options=options), ONE)
    assert len(seen.losses) == 10


# ---- experts ---------------------------------------------------------------------------------------------------------

EXPERTS = 4


@cache
def with_experts() -> str:
    """Return a folder with a model whose tokens go to one of four experts."""
    folder = mkdtemp(prefix="experts-")
    torch.manual_seed(0)
    shape = {**SHAPE, "vocab_size": 265}
    config = GptOssConfig(**shape, num_local_experts=EXPERTS, num_experts_per_tok=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    Pretrained("demo").tokenizer.save_pretrained(folder)
    return folder


def steered(order: Sequence[int], harm: Callable[[LoRA], None] = lambda module: None) -> type[LoRA]:
    """Return a method that sends all tokens of a step to one expert, in turn."""

    class Steered(LoRA):
        def training_step(self, step: StepBatch, index: int) -> Tensor:
            for name, parameter in self.named_parameters():
                if name.endswith("router.bias"):
                    parameter.data = torch.eye(EXPERTS)[order[index % len(order)]] * 100
            return super().training_step(step, index)

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            harm(self)
            super().on_before_optimizer_step(optimizer)

    return Steered


def train_experts(method: type[LoRA]) -> int:
    """Return how many steps went well."""
    options = {**SMALL, "targets": ["experts", "q_proj"]}
    return len(trained(Case("experts", method=method, model=with_experts(), options=options), ONE).losses)


@pytest.mark.parametrize("order", [[0], range(EXPERTS), [0, 0, 3]], ids=str)
def test_an_expert_without_tokens_raises_no_alarm(order: Sequence[int]) -> None:
    assert train_experts(steered(order)) == 10


@pytest.mark.parametrize(
    ("end", "steps"), [("lora_B.default.weight", 1), ("lora_A.default.weight", EXPERTS + 1)], ids=["B", "A"]
)
def test_experts_of_which_none_ever_moves_are_named(end: str, steps: int) -> None:
    dead = f"model.layers.1.mlp.experts.base_layer.{end}"

    def harm(module: LoRA) -> None:
        module.get_parameter(f"model.{dead}").grad = None

    with pytest.raises(DeadAdapterError, match=f"1 of 12 .* have not changed in {steps} steps: {dead}"):
        train_experts(steered(range(EXPERTS), harm))


def test_experts_that_have_learnt_nothing_are_named_at_the_export(tmp_path: Path) -> None:
    kept: list[LoRA] = []

    class Kept(LoRA):
        def on_train_end(self) -> None:
            super().on_train_end()
            kept.append(self)

    train_experts(Kept)
    kept[0].get_parameter("model.model.layers.0.mlp.experts.lora_B.default.weight").data.zero_()
    with pytest.raises(HubError, match=r"1 of 12 .* are zero after the training: .*layers.0.mlp.experts.lora_B"):
        kept[0].export(tmp_path / "adapter", Pretrained("demo").tokenizer)


class Routed(nn.Module):
    """Experts in modules of their own, one for each input."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.dense = nn.Linear(4, 4)

    def forward(self, inputs: Tensor, expert: int) -> Tensor:
        outputs: Tensor = self.dense(self.experts[expert](inputs))
        return outputs


def watched_steps(order: Sequence[int], *, with_dense: bool = True) -> int:
    """Train adapters of all layers, each step through one expert; return how many steps went well."""
    torch.manual_seed(0)
    model = Routed()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "1", "2", "dense"]), model)
    activity = AdapterUpdateCheck(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0)
    for expert in order:
        optimizer.zero_grad()
        model(torch.randn(5, 4), expert).square().sum().backward()
        if not with_dense:
            model.get_parameter("dense.lora_A.default.weight").grad = None
        activity.before_step(optimizer)
        optimizer.step()
        activity.after_step(counts=True)
    return activity.steps


def test_experts_in_modules_of_their_own_are_judged_together() -> None:
    assert watched_steps([0, 1, 2, 0]) == 4
    with pytest.raises(DeadAdapterError, match=r"1 of 8 .* in 2 steps: dense.lora_A"):
        watched_steps([0, 1, 2, 0], with_dense=False)
