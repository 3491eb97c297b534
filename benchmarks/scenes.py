"""What ``benchmarks.forgetting`` teaches to whom: a model that knows one task, lessons for two more, their tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import room
from benchmarks.keepers import targets
from lightning_hub.data.sample_store import SampleStore
from lightning_hub.data.step_plan import BatchSettings, StepPlan
from lightning_hub.demo.tasks import PRETRAINING, SHOUT, ChatExample, Task, conversations
from lightning_hub.methods.osft.subspace import split_subspace, trained_rank
from lightning_hub.models.generation import complete
from lightning_hub.models.pretrained import Pretrained
from lightning_hub.ops.attention import PACKED
from lightning_hub.ops.attention_proof import capabilities_of
from lightning_hub.ops.batch import IGNORE_INDEX
from lightning_hub.ops.loss import ModelCapabilities

ROW = 512
"""Tokens of a row."""


class Scene(Protocol):
    """A model that knows the first of its tasks, and lessons for the others.

    Attributes:
        tasks: Their names.
        ratio: Share of the singular directions that may train.
    """

    tasks: tuple[str, ...]
    ratio: float

    def model(self, seed: int) -> PreTrainedModel:
        """Return the model that knows the first task."""

    def capabilities(self) -> ModelCapabilities:
        """Return what is known about the models."""

    def lesson(self, place: int, seed: int, steps: int) -> StepPlan:
        """Return the steps that teach a task."""

    def test(self, model: PreTrainedModel, place: int, seed: int) -> float:
        """Return the share of a task's questions that a model answers exactly."""


class Room:
    """A small model with room, made for each seed, and tasks of alphabets of their own: see ``benchmarks.room``.

    Args:
        steps: In which the model is made.
    """

    tasks: tuple[str, ...] = ("reverse", "facts", "rotate")
    ratio: float = 0.5
    batch, tested = 48, 200

    def __init__(self, steps: int = room.Recipe.steps) -> None:
        self.steps = steps

    def model(self, seed: int) -> PreTrainedModel:
        """Return the model of a seed, which has learnt to reverse."""
        return _room_model(room.Recipe(seed, self.steps))

    def capabilities(self) -> ModelCapabilities:
        """Return what is known about models of this kind."""
        return _room_traits()

    def lesson(self, place: int, seed: int, steps: int) -> StepPlan:
        """Return the steps that teach a task."""
        return room.plan(room.tasks(seed)[place], steps * self.batch, seed + 10_000 * place, self.batch, ROW)

    def test(self, model: PreTrainedModel, place: int, seed: int) -> float:
        """Return the share of random questions that are answered exactly."""
        return answered(model, room.tasks(seed)[place], self.tested, seed + 500_000)


@cache
def _room_model(recipe: room.Recipe) -> PreTrainedModel:
    return recipe.cached()


@cache
def _room_traits() -> ModelCapabilities:
    return capabilities_of(room.Recipe(0).model())


DOUBLE = Task("double", "Double {word}.", lambda word: word + word)


class Embedded:
    """The model that the package brings along, which spells and reverses, and new questions about the same words."""

    tasks: tuple[str, ...] = ("known", "shout", "double")
    ratio: float = 0.25
    batch, tested = 16, 60
    lessons: tuple[tuple[Task, ...], ...] = (PRETRAINING, (SHOUT,), (DOUBLE,))

    def model(self, seed: int) -> PreTrainedModel:
        """Return the embedded model, whatever the seed."""
        return _embedded()[1]

    def capabilities(self) -> ModelCapabilities:
        """Return what is known about it."""
        return _embedded()[2]

    def lesson(self, place: int, seed: int, steps: int) -> StepPlan:
        """Return the steps that teach a task."""
        rows = self._rows(place, seed, steps * self.batch + self.tested)[self.tested :]
        tokenizer = _embedded()[0].tokenizer
        pairs = []
        for turns in (row["messages"] for row in rows):
            asked = cast(
                "list[int]", tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
            )
            whole = cast("list[int]", tokenizer.apply_chat_template(turns, return_dict=False))
            pairs.append((whole, [IGNORE_INDEX] * len(asked) + whole[len(asked) :]))
        return StepPlan(SampleStore.from_pairs(pairs), BatchSettings(ROW, self.batch, None, shuffle=True, seed=seed))

    def test(self, model: PreTrainedModel, place: int, seed: int) -> float:
        """Return the share of held-out words for which the answer is written exactly, greedily."""
        rows = self._rows(place, seed, self.tested)
        answers = complete(model, _embedded()[0].tokenizer, [row["messages"][:1] for row in rows], max_new_tokens=24)
        right = sum(found == row["messages"][1]["content"] for found, row in zip(answers, rows, strict=True))
        return right / len(rows)

    def _rows(self, place: int, seed: int, count: int) -> Sequence[ChatExample]:
        return conversations(self.lessons[place], count, seed=seed + 10_000 * place)


@cache
def _embedded() -> tuple[Pretrained, PreTrainedModel, ModelCapabilities]:
    """Return the embedded model in float32, and what is known of it."""
    pretrained = Pretrained("demo")
    model = pretrained.load(dtype=torch.float32, attn_implementation=PACKED)
    return pretrained, model, capabilities_of(model)


SCENES: dict[str, Callable[[], Scene]] = {"room": Room, "embedded": Embedded}


@torch.no_grad()
def answered(model: PreTrainedModel, task: room.Task, count: int, seed: int) -> float:
    """Return the share of random questions whose answers a model writes exactly, greedily.

    Each token is asked for after the right ones before it: all are right if, and only if, greedy writing is.
    """
    source = random.Random(seed)
    asked = [task(source) for _ in range(count)]
    ids = torch.tensor([[*q, room.SEPARATOR, *a[:-1]] for q, a in asked])
    answers = torch.tensor([a for _, a in asked])
    model.eval().set_attn_implementation("sdpa")  # the questions are equally long: no row is packed
    found = model(input_ids=ids, use_cache=False).logits[:, -answers.shape[1] :].argmax(-1)
    model.set_attn_implementation(PACKED)
    return float((found == answers).all(1).float().mean())


@torch.no_grad()
def room_left(model: PreTrainedModel, ask: Callable[[], object], ratio: float) -> dict[str, tuple[float, float]]:
    """Return of each target how much of it, and of what comes into it, lies in its smallest singular directions.

    Args:
        model: The model.
        ask: Asks it something.
        ratio: How many of the directions count as small.

    Returns:
        By layer, the share of the squared singular values and that of the squared inputs.
    """
    chosen = targets(model)
    splits = {
        one.module: split_subspace(model.get_parameter(one.full_name), trained_rank(ratio, min(one.shape)))
        for one in chosen
    }
    inputs = {name: [0.0, 0.0] for name in splits}  # in the small directions, in all

    def count(name: str, came: Tensor) -> None:
        parts, seen = splits[name], came.double()
        inputs[name][0] += float((seen @ parts.v[parts.protected :].mT).square().sum())
        inputs[name][1] += float(seen.square().sum())

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, came, name=name: count(name, came[0]))
        for name in splits
    ]
    ask()
    for hook in hooks:
        hook.remove()
    return {
        name: (
            float(parts.values[parts.protected :].square().sum() / parts.values.square().sum()),
            inputs[name][0] / inputs[name][1],
        )
        for name, parts in splits.items()
    }
