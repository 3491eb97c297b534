"""The gradient of a step is that of one big batch, whatever the packing."""

from __future__ import annotations

from functools import cache
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_hub.data.sample_store import SampleStore
from lightning_hub.data.step_plan import BatchSettings, StepPlan
from lightning_hub.methods.sft import SFT
from lightning_hub.ops.batch import StepBatch
from tests.ops.models import VOCABULARY, make


class Steps(DataLoader[StepBatch]):
    """Feeds given steps to a trainer."""

    def __init__(self, steps: list[StepBatch]) -> None:
        super().__init__(steps, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset


@cache
def smooth_model() -> str:
    """A random model: a trained one answers random ids so sharply that float32 alone costs more than the bar."""
    folder = mkdtemp(prefix="smooth-model-")
    make("llama", "sdpa").save_pretrained(folder)
    return folder


class Watched(SFT):
    """Keeps the gradients of each step, before they are clipped, and moves nothing."""

    def __init__(self, **options: Any) -> None:
        super().__init__(smooth_model(), learning_rate=0.0, lr_scheduler="constant", **options)
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.losses: list[float] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None})
        self.losses.append(float(self.step_loss))


def run(steps: list[StepBatch], precision: Any = "32-true", **options: Any) -> Watched:
    module = Watched(**options)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, train_dataloaders=Steps(steps))
    return module


def samples(lengths: list[int], seed: int = 0) -> SampleStore:
    source = np.random.default_rng(seed)
    pairs = []
    for length in lengths:
        ids = source.integers(3, VOCABULARY, length).tolist()
        labels = [token if source.random() < 0.5 else -100 for token in ids]
        pairs.append((ids, [-100, *labels[1:-1], ids[-1]]))
    return SampleStore.from_pairs(pairs)


def reference(data: SampleStore, members: list[int]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch of lone documents: the mean over all trained tokens."""
    model = AutoModelForCausalLM.from_pretrained(smooth_model(), dtype=torch.float32, attn_implementation="sdpa")
    total, count = torch.zeros(()), 0
    for index in members:
        ids, labels = (torch.from_numpy(part.astype(np.int64)) for part in data[index])
        logits = model(ids.unsqueeze(0), use_cache=False).logits[0, :-1]
        total = total + F.cross_entropy(logits, labels[1:], reduction="sum")
        count += int((labels[1:] != -100).sum())
    (total / count).backward()
    return float(total.detach() / count), {
        f"model.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None
    }


def assert_same(module: Watched, place: int, expected: tuple[float, dict[str, torch.Tensor]], tolerance: float) -> None:
    loss, gradients = expected
    assert module.losses[place] == pytest.approx(loss, rel=tolerance)
    difference = [module.gradients[place][name] - gradient for name, gradient in gradients.items()]
    assert torch.nn.utils.get_total_norm(difference) <= tolerance * torch.nn.utils.get_total_norm(gradients.values())


@settings(max_examples=5, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 30), min_size=3, max_size=9),
    cap=st.integers(30, 60),
    batch=st.integers(2, 5),
    seed=st.integers(0, 99),
)
def test_gradients_equal_one_unpacked_batch(lengths: list[int], cap: int, batch: int, seed: int) -> None:
    data = samples(lengths, seed)
    plan = StepPlan(data, BatchSettings(cap, batch, None, shuffle=True, seed=seed))
    module = run([plan.step(0, index) for index in range(len(plan))])
    for index in range(len(plan)):  # the last step is often a partial one
        assert_same(module, index, reference(data, plan.sample_indices(0, index)), 1e-6)


def test_gradient_checkpointing_changes_nothing() -> None:
    plan = StepPlan(samples([9, 20, 14]), BatchSettings(32, 3, None, shuffle=False, seed=0))
    plain, recomputed = (run([plan.step(0, 0)], gradient_checkpointing=on) for on in (False, True))
    assert recomputed.model is not None
    assert any(getattr(part, "gradient_checkpointing", False) for part in recomputed.model.modules())
    assert_same(recomputed, 0, (plain.losses[0], plain.gradients[0]), 1e-6)


def test_mixed_precision_stays_near_and_rows_do_not_matter() -> None:
    data = samples([9, 20, 14, 30])
    several, one = (StepPlan(data, BatchSettings(cap, 4, None, shuffle=False, seed=0)).step(0, 0) for cap in (30, 200))
    exact, in_rows, at_once = run([one]), run([several], "bf16-mixed"), run([one], "bf16-mixed")
    assert len(several.rows) > len(one.rows)
    assert_same(at_once, 0, (exact.losses[0], exact.gradients[0]), 5e-2)
    assert_same(in_rows, 0, (at_once.losses[0], at_once.gradients[0]), 2e-2)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("16-true", torch.float16)])
def test_half_precision_trains_and_rounds_nothing_but_weights(
    precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []

    def kept(self: SFT, row: Any, step: StepBatch) -> torch.Tensor:
        shares.append(float((share := row_loss(self, row, step)).detach()))
        return share

    row_loss = SFT.row_loss
    monkeypatch.setattr(SFT, "row_loss", kept)
    plan = StepPlan(samples([29, 20, 14, 31]), BatchSettings(32, 4, None, shuffle=False, seed=0))
    module = run([plan.step(0, 0)], precision)
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert len(shares) == 4
    assert module.losses[0] == pytest.approx(sum(shares), rel=1e-6)
    assert module.model is not None
    for (name, ours), (_, theirs) in zip(
        module.model.named_buffers(), make("llama", "sdpa").named_buffers(), strict=True
    ):
        assert torch.equal(ours, theirs), name  # rotary frequencies: a rounded one turns far tokens the wrong way


def test_the_test_notices_a_mean_of_means(monkeypatch: pytest.MonkeyPatch) -> None:
    def mean_of_means(self: SFT, row: Any, step: StepBatch) -> torch.Tensor:
        assert self.loss_head is not None
        loss: torch.Tensor = self.loss_head(row) / (len(step.rows) * (row.labels != -100).sum())
        return loss

    data = samples([30, 4, 4, 30, 4])
    plan = StepPlan(data, BatchSettings(34, 5, None, shuffle=False, seed=0))
    monkeypatch.setattr(SFT, "row_loss", mean_of_means)
    with pytest.raises(AssertionError):
        assert_same(run([plan.step(0, 0)]), 0, reference(data, plan.sample_indices(0, 0)), 1e-2)


def test_no_decay_of_norms_and_biases() -> None:
    module = run(
        [StepPlan(samples([9]), BatchSettings(32, 1, None, shuffle=False, seed=0)).step(0, 0)], weight_decay=0.1
    )
    decayed, spared = module.trainer.optimizers[0].param_groups
    assert decayed["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0.0
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in spared["params"]} == {1}


def test_biases_of_experts_are_biases_too() -> None:
    module = SFT("unused", weight_decay=0.1)
    module.model = make("gpt-oss, sinks", "eager")
    decayed, spared = ({id(one) for one in group["params"]} for group in module.parameter_groups())
    biases = {id(one) for name, one in module.named_parameters() if name.endswith("bias")}
    assert biases <= spared
    assert {id(one) for one in module.parameters() if one.ndim > 1} - biases == decayed
