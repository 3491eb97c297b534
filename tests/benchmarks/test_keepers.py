"""The contenders of the benchmark of forgetting are what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer
from transformers import PreTrainedModel

from benchmarks.keepers import PEER, Chain, Learner, leak, learner, targets
from benchmarks.room import Recipe
from lightning_hub.methods.osft.subspace import trained_rank

RATIO = 0.25


@pytest.fixture
def plain() -> PreTrainedModel:
    """Return a model that has learnt nothing."""
    model = Recipe(1).model()
    model.set_attn_implementation("sdpa")
    return model


def _taught(taught: Learner, kind: type[Optimizer], steps: int, rate: float) -> PreTrainedModel:
    """Take a few steps towards some tokens, without clipping, and return the plain model."""
    ids = torch.arange(48).reshape(4, 12)
    optimizer = kind(taught.trained, lr=rate)  # type: ignore[call-arg]  # every optimizer has a learning rate
    for _ in range(steps):
        optimizer.zero_grad()
        taught.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        taught.before_clipping()
        taught.before_step()
        optimizer.step()
        taught.after_step()
    return taught.merged()


@pytest.mark.parametrize("name", ["sft", "sft targets", "lora", "osft", "osft thin", "peft osf", "factors"])
def test_without_a_step_a_contender_is_the_plain_model(name: str, plain: PreTrainedModel) -> None:
    merged = learner(name, plain, RATIO).merged()
    for key, tensor in plain.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[key], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["sft targets", "lora", "osft", "osft thin", "peft osf", "factors"])
def test_only_the_targets_change(name: str, plain: PreTrainedModel) -> None:
    after = _taught(learner(name, plain, RATIO), AdamW, 2, 1e-3).state_dict()
    changed = {key for key, tensor in plain.state_dict().items() if not torch.equal(after[key], tensor)}
    wanted = {matrix.full_name for matrix in targets(plain)}
    assert wanted <= changed
    for key in changed - wanted:  # peft writes nothing else either, but for rounding
        torch.testing.assert_close(after[key], plain.state_dict()[key], rtol=0, atol=1e-6)


def test_lora_trains_about_as_many_numbers_as_osft(plain: PreTrainedModel) -> None:
    lora, osft = (sum(one.numel() for one in learner(name, plain, RATIO).trained) for name in ("lora", "osft"))
    assert lora == pytest.approx(osft, rel=0.05)


@pytest.mark.parametrize("name", ["peft osf fewer", "factors fewer"])
def test_forms_with_fewer_directions_train_about_as_many_numbers_as_osft(name: str, plain: PreTrainedModel) -> None:
    found, osft = (sum(one.numel() for one in learner(one, plain, RATIO).trained) for one in (name, "osft"))
    assert found == pytest.approx(osft, rel=0.05)


def test_in_a_chain_each_task_has_directions_of_its_own(plain: PreTrainedModel, tmp_path: Path) -> None:
    chain = Chain(tmp_path, tasks=2)
    first = _taught(learner("osft chained", plain, RATIO, chain), AdamW, 3, 1e-3)
    second = _taught(learner("osft chained", first, RATIO, chain), AdamW, 3, 1e-3)
    assert leak(plain, second, RATIO) < 1e-5, "together they stay in the directions of one"
    for matrix in targets(plain):
        start, middle, end = (model.get_parameter(matrix.full_name).double() for model in (plain, first, second))
        before, after = middle - start, end - middle
        for crossed in (before.mT @ after, before @ after.mT):
            assert float(crossed.norm() / before.norm() / after.norm()) < 1e-5


def test_peft_protects_as_many_directions(plain: PreTrainedModel) -> None:
    model = learner("peft osf", plain, RATIO).model
    trained = {name: one.shape for name, one in model.named_parameters() if one.requires_grad}
    for matrix in targets(plain):
        ranks = {min(shape) if len(shape) > 1 else shape[0] for name, shape in trained.items() if matrix.module in name}
        assert ranks == {trained_rank(RATIO, min(matrix.shape))}


def test_the_leak_is_that_of_a_change_of_which_it_is_known(plain: PreTrainedModel) -> None:
    for name in ("osft", "factors"):
        assert leak(plain, _taught(learner(name, plain, RATIO), AdamW, 3, 1e-3), RATIO) < 1e-5
    after = _taught(learner("sft targets", plain, RATIO), SGD, 1, 1e-3)
    assert leak(plain, after, RATIO) > 0.5


def test_gradients_of_the_three_factors_are_projected_before_they_are_clipped(plain: PreTrainedModel) -> None:
    taught = learner("factors", plain, RATIO)
    ids = torch.arange(48).reshape(4, 12)
    taught.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    taught.before_clipping()
    for matrix in targets(plain):
        change = taught.model.get_submodule(f"{matrix.module}.parametrizations.weight.0")
        gradient, high = change.get_parameter("u").grad, change.get_parameter("u_high")
        assert gradient is not None
        assert float((high.mT @ gradient).norm() / gradient.norm()) < 1e-5


def test_the_form_of_three_factors_is_that_of_its_authors(plain: PreTrainedModel) -> None:
    pytest.importorskip(PEER)
    ours, theirs = (_taught(learner(name, plain, RATIO), AdamW, 5, 1e-3) for name in ("factors", "mini-trainer"))
    for matrix in targets(plain):
        start, one, other = (model.get_parameter(matrix.full_name) for model in (plain, ours, theirs))
        assert float((one - other).norm() / (one - start).norm()) < 0.01
