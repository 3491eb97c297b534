"""A small model with room, as large pretrained models have it, and three tasks for it.

A trained weight has room where its smallest singular directions are not used by what it knows. Two things make it so
here. The matrices are trained with weight decay, until what they were filled with at random has died out and each is
all but a sum of gradients: then its rows lie in the span of what the task has put in, its columns in that of what came
back. And their optimizer scales the step of a matrix as a whole. Adam scales each number by itself, which is no linear
function of the gradient: it tilts the directions of a matrix out of those spans, so that about ten times as much of
what the task puts in lies in the smallest directions.

Embeddings and output layer are random and stay as they are, so that letters of tasks to come are as good as those of
the first. They are orthonormal, as random ones nearly are in a wide model: among 128 directions, random letters would
share a fifth of their square with what another task's letters span; among 4,096 less than a hundredth.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_hub.data.sample_store import SampleStore
from lightning_hub.data.step_plan import BatchSettings, StepPlan
from lightning_hub.ops.attention import PACKED
from lightning_hub.ops.attention_proof import proven_loss
from lightning_hub.ops.batch import IGNORE_INDEX
from lightning_hub.runs.folder import default_cache_dir

LETTERS, SEPARATOR = 24, 0
"""Letters of each task's own alphabet; the token between question and answer, which all tasks share."""

Question = tuple[list[int], list[int]]
"""Question and answer, in token ids."""

Task = Callable[[random.Random], Question]
"""Makes a question."""


def alphabet(place: int) -> list[int]:
    """Return the token ids of a task's letters."""
    return [1 + LETTERS * place + letter for letter in range(LETTERS)]


def cipher(place: int, seed: int, turn: Callable[[list[int]], list[int]]) -> Task:
    """Return a task: words of five letters, moved about and each letter replaced by another, always the same."""
    letters = alphabet(place)
    replaced = dict(zip(letters, random.Random(seed).sample(letters, LETTERS), strict=True))

    def ask(source: random.Random) -> Question:
        word = source.choices(letters, k=5)
        return word, [replaced[letter] for letter in turn(word)]

    return ask


def facts(place: int, seed: int, count: int = 128) -> Task:
    """Return a task: facts to remember, each two letters that answer two letters. All are taught and asked for."""
    source, letters = random.Random(seed), alphabet(place)
    keys = source.sample([[first, second] for first in letters for second in letters], count)
    known = [(key, source.choices(letters, k=2)) for key in keys]
    return lambda source: source.choice(known)


def tasks(seed: int) -> list[Task]:
    """Return the three tasks of a seed, the first of which the model of that seed knows."""
    return [
        cipher(0, seed, lambda word: word[::-1]),
        facts(1, seed + 1),
        cipher(2, seed + 2, lambda word: word[2:] + word[:2]),
    ]


def plan(task: Task, count: int, seed: int, batch: int, row: int) -> StepPlan:
    """Return the steps that random questions of a task make; answers are trained."""
    source = random.Random(seed)
    asked = [task(source) for _ in range(count)]
    pairs = [([*q, SEPARATOR, *a], [IGNORE_INDEX] * (len(q) + 1) + a) for q, a in asked]
    return StepPlan(SampleStore.from_pairs(pairs), BatchSettings(row, batch, None, shuffle=True, seed=seed))


@dataclass(frozen=True)
class Recipe:
    """How the model of a seed is made."""

    seed: int
    steps: int = 1500
    batch: int = 32
    rate: float = 3e-3
    decay: float = 1.0

    def model(self) -> LlamaForCausalLM:
        """Return it untrained: 0.3 million parameters in its matrices."""
        torch.manual_seed(self.seed)
        config = LlamaConfig(
            vocab_size=1 + 3 * LETTERS,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
        made = LlamaForCausalLM(config)
        made.set_attn_implementation(PACKED)
        with torch.no_grad():
            torch.nn.init.orthogonal_(made.model.embed_tokens.weight)
            made.lm_head.weight.copy_(made.model.embed_tokens.weight)
        return made

    def trained(self) -> LlamaForCausalLM:
        """Return it when it has learnt the first task."""
        made = self.model()
        made.model.embed_tokens.requires_grad_(False)
        made.lm_head.requires_grad_(False)
        parameters = [parameter for parameter in made.parameters() if parameter.requires_grad]
        optimizer = WholeMatrix(parameters, self.rate, self.decay)
        fall = 0.4 * self.steps
        schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50, (self.steps - step) / fall))
        head = proven_loss(made)
        steps = plan(tasks(self.seed)[0], self.steps * self.batch, self.seed, self.batch, row=512)
        for index in range(self.steps):
            step = steps.step(0, index)
            optimizer.zero_grad()
            for row in step.rows:
                (head(row) / step.num_trained).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
        return made.requires_grad_(False)

    def cached(self) -> LlamaForCausalLM:
        """Return it trained, from the cache if it has been made before."""
        made_by = repr(sorted(asdict(self).items())).encode() + Path(__file__).read_bytes()
        folder = default_cache_dir() / "forgetting" / hashlib.sha256(made_by).hexdigest()[:16]
        if not (folder / "config.json").exists():
            fresh = folder.with_suffix(f".{os.getpid()}")
            self.trained().save_pretrained(fresh)
            with contextlib.suppress(OSError):  # another process was quicker
                fresh.rename(folder)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=PACKED)
        return model.requires_grad_(False)


class WholeMatrix(Optimizer):
    """Adam with one second moment for a whole parameter, and decoupled weight decay for matrices.

    Its steps are sums of gradients, so they lie in the span of what a task puts in and gets back.
    """

    def __init__(self, parameters: Iterable[Tensor], rate: float, decay: float) -> None:
        super().__init__(list(parameters), {"lr": rate, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure is ever given
        """Move every parameter."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(count=0, mean=torch.zeros_like(parameter), square=torch.zeros(()))
                state["count"] += 1
                state["mean"].lerp_(parameter.grad, 0.1)
                state["square"].lerp_(parameter.grad.square().mean(), 0.02)
                mean, square = (
                    state["mean"] / (1 - 0.9 ** state["count"]),
                    state["square"] / (1 - 0.98 ** state["count"]),
                )
                if parameter.ndim == 2:
                    parameter.mul_(1 - group["lr"] * group["decay"])
                parameter.sub_(group["lr"] * mean / (square.sqrt() + 1e-8))
