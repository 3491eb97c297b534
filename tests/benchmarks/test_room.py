"""The model with room: what its optimizer leaves alone, and that what is measured on it is what it says."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from benchmarks.forgetting import Outcome, best
from benchmarks.room import SEPARATOR, Recipe, Task, WholeMatrix, tasks
from benchmarks.scenes import answered, room_left


def _outside(optimizer: Optimizer, weight: Tensor, inputs: Tensor) -> float:
    """Return the share of a weight, after some steps, that lies outside the span of its inputs."""
    goal = torch.randn(len(inputs), 10)
    for _ in range(20):
        optimizer.zero_grad()
        (inputs @ weight.mT - goal).square().mean().backward()
        optimizer.step()
    basis, _ = torch.linalg.qr(inputs.mT)
    found = weight.detach()
    return float((found - found @ basis @ basis.mT).norm() / found.norm())


def test_steps_of_whole_matrices_stay_in_the_span_of_the_inputs_and_adams_do_not() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(4, 16)
    whole, single = (torch.zeros(10, 16, requires_grad=True) for _ in range(2))
    assert _outside(WholeMatrix([whole], 0.01, 0.1), whole, inputs) < 1e-5
    assert _outside(Adam([single], 0.01), single, inputs) > 0.1


def test_an_answer_counts_if_greedy_writing_gives_it() -> None:
    model, source = Recipe(3).model().eval(), random.Random(0)
    model.set_attn_implementation("sdpa")
    asked = []
    for number in range(20):
        word = random.Random(number).choices(range(1, 25), k=5)
        ids = torch.tensor([[*word, SEPARATOR]])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5)[0, 6:]
        answer = written.tolist()
        if number % 4 == 0:  # one letter is another one
            place = number // 4
            answer[place] = (answer[place] + 1) % 73
        asked.append((word, answer))
    questions = iter(asked)
    assert answered(model, lambda _: next(questions), 20, seed=source.randrange(9)) == 0.75


def test_room_is_what_a_plain_decomposition_says() -> None:
    model, task = Recipe(0).model(), tasks(0)[0]
    found = room_left(model, lambda: answered(model, task, 200, seed=5), 0.25)["model.layers.0.self_attn.v_proj"]
    source = random.Random(5)
    asked = [task(source) for _ in range(200)]
    ids = torch.tensor([[*question, SEPARATOR, *answer[:-1]] for question, answer in asked])
    layer = model.model.layers[0]
    inputs = layer.input_layernorm(model.model.embed_tokens(ids)).flatten(0, 1).detach()
    _, values, directions = torch.linalg.svd(layer.self_attn.v_proj.weight.detach())
    assert found[0] == pytest.approx(float(values[96:].square().sum() / values.square().sum()), rel=1e-3)
    assert found[1] == pytest.approx(
        float((inputs @ directions[96:].mT).square().sum() / inputs.square().sum()), rel=1e-3
    )


def test_the_tasks_of_a_seed_have_letters_of_their_own_and_do_not_change() -> None:
    def letters(task: Task) -> set[int]:
        source = random.Random(1)
        return {letter for _ in range(300) for part in task(source) for letter in part}

    sets = [letters(task) for task in tasks(7)]
    assert [len(one) for one in sets] == [24, 24, 24]
    assert len(set().union(*sets)) == 72
    assert [task(random.Random(2)) for task in tasks(7)] == [task(random.Random(2)) for task in tasks(7)]


def test_a_model_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_HUB_CACHE", str(tmp_path))
    recipe = Recipe(0, steps=3)
    first = recipe.cached().state_dict()
    monkeypatch.setattr(Recipe, "trained", lambda _: pytest.fail("made a second time"))
    again = recipe.cached().state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_the_best_rate_has_the_best_average_and_learns_more_of_equals() -> None:
    def outcome(known: float, second: float, third: float) -> Outcome:
        return Outcome([[1.0, 0.0, 0.0], [known, second, 0.0], [known, 0.0, third]], [])

    learns, keeps, both = outcome(0.0, 1.0, 1.0), outcome(1.0, 0.0, 0.0), outcome(0.9, 0.5, 0.5)
    assert (learns.average, learns.learnt, learns.kept, learns.backward_transfer) == (1 / 3, 1.0, 0.0, -1.0)
    assert best([(1.0, keeps), (2.0, both), (3.0, learns)]) == 2.0
    assert best([(1.0, keeps), (3.0, learns)]) == 3.0
