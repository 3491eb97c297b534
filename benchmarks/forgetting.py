"""What a model still knows after it has learnt two further tasks, one after the other, by six methods.

The first task, spelling and reversing words, is what the embedded model knows; shouting and doubling are new to it.
Each stage begins with the plain model that the stage before has left, as ``fit --model RUN/export`` does. All methods
take the same steps over the same rows, each with the learning rate at which it learnt shouting best on a seed of its
own (the best average over all tasks would choose a rate at which nothing is learnt, and so nothing forgotten).
Accuracy is the share of held-out words that are answered exactly, greedily. At last, what the orthogonal methods leak
into directions that they promise to leave alone: the largest share of any weight's change.

usage: python -m benchmarks.forgetting [--seeds 5] [--steps 300] [--ratio 0.25] [--quick]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from benchmarks.keepers import NAMES, ORTHOGONAL, Learner, leak, learner
from benchmarks.records import ONE_THREAD, record, table
from lightning_hub.data.samples import Samples
from lightning_hub.data.steps import Batching, StepPlan
from lightning_hub.demo.tasks import PRETRAINING, SHOUT, Conversation, Task, conversations
from lightning_hub.methods.schedule import Schedule
from lightning_hub.models.generation import complete
from lightning_hub.models.pretrained import Pretrained
from lightning_hub.ops.attention import PACKED
from lightning_hub.ops.loss import LossHead, Traits
from lightning_hub.ops.rows import IGNORED
from lightning_hub.runs.files import Json

DOUBLE = Task("double", "Double {word}.", lambda word: word + word)
TASKS: tuple[tuple[Task, ...], ...] = (PRETRAINING, (SHOUT,), (DOUBLE,))
"""The first is known; each further one is learnt in a stage."""

GRIDS: dict[str, tuple[float, ...]] = {
    "sft": (3e-4, 1e-3, 2e-3),
    "osft": (3e-3, 1e-2, 3e-2),
    "osft thin": (3e-3, 1e-2, 3e-2),
    "lora": (1e-3, 3e-3, 1e-2),
    "peft osf": (1e-3, 3e-3, 1e-2),
    "factors": (1e-3, 3e-3, 1e-2),
}
"""Learning rates that are tried: the forms differ by factors in how far a step moves a weight."""

BATCH, TESTED, ROW = 16, 60, 512
"""Samples of a step, words of a test, tokens of a row."""

TUNING_SEED = 1000


@dataclass(frozen=True)
class Outcome:
    """Accuracy on each task, after each stage.

    Attributes:
        grid: ``grid[stage][task]``; stage 0 is the model before anything is learnt.
    """

    grid: list[list[float]]

    @property
    def average(self) -> float:
        """Accuracy over all tasks at the end."""
        return statistics.mean(self.grid[-1])

    @property
    def learnt(self) -> float:
        """Accuracy on each new task right after its own stage, on average."""
        return statistics.mean(self.grid[stage][stage] for stage in range(1, len(self.grid)))

    @property
    def kept(self) -> float:
        """Accuracy at the end on what was known in the beginning, as a share of what it was."""
        return self.grid[-1][0] / max(self.grid[0][0], 1e-9)

    @property
    def backward_transfer(self) -> float:
        """What later tasks have changed in the accuracy on earlier ones; negative if they were forgotten."""
        stages = range(len(self.grid) - 1)
        return statistics.mean(self.grid[-1][task] - self.grid[task][task] for task in stages)


@cache
def embedded() -> tuple[Pretrained, PreTrainedModel, Traits]:
    """Return the embedded model in float32, and what is known of it."""
    pretrained = Pretrained("demo")
    model = pretrained.load(dtype=torch.float32, attn_implementation=PACKED)
    return pretrained, model, Traits.of(model)


def plan(rows: list[Conversation], seed: int) -> StepPlan:
    """Return the steps that a list of conversations makes."""
    tokenizer = embedded()[0].tokenizer
    pairs = []
    for turns in (row["messages"] for row in rows):
        asked = cast(
            "list[int]", tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
        )
        whole = cast("list[int]", tokenizer.apply_chat_template(turns, return_dict=False))
        pairs.append((whole, [IGNORED] * len(asked) + whole[len(asked) :]))
    return StepPlan(Samples.from_pairs(pairs, f"seed {seed}"), Batching(ROW, BATCH, None, shuffle=True, seed=seed))


def teach(taught: Learner, steps: StepPlan, rate: float, weight_decay: float = 0.0) -> PreTrainedModel:
    """Train for one pass over the steps and return the plain model that comes out."""
    head = LossHead(taught.model, traits=embedded()[2])
    taught.model.train()
    optimizer = AdamW(taught.trained, lr=rate, betas=(0.9, 0.98), weight_decay=weight_decay)
    schedule = LambdaLR(optimizer, Schedule("wsd", min(20, len(steps) // 5), len(steps), 0.0))
    for index in range(len(steps)):
        step = steps.step(0, index)
        optimizer.zero_grad()
        for row in step.rows:
            (head(row) / step.num_trained).backward()
        taught.before_clipping()
        torch.nn.utils.clip_grad_norm_(taught.trained, 1.0)
        optimizer.step()
        schedule.step()
        taught.after_step()
    return taught.merged().requires_grad_(False)


def accuracy(model: PreTrainedModel, rows: Sequence[Conversation]) -> float:
    """Return the share of questions that a model answers exactly."""
    answers = complete(model, embedded()[0].tokenizer, [row["messages"][:1] for row in rows], max_new_tokens=24)
    right = sum(found == row["messages"][1]["content"] for found, row in zip(answers, rows, strict=True))
    return right / len(rows)


def sequence(name: str, rate: float, seed: int, steps: int, ratio: float, num_tasks: int = len(TASKS)) -> Outcome:
    """Teach the new ones of the first tasks one after another, and test all of these after each."""
    torch.manual_seed(seed)
    model = embedded()[1]
    tests, lessons = [], []
    for number, task in enumerate(TASKS[:num_tasks]):
        rows = conversations(task, steps * BATCH + TESTED, seed=seed + 10_000 * number)
        tests.append(rows[:TESTED])
        lessons.append(rows[TESTED:])
    grid = [[accuracy(model, rows) for rows in tests]]
    for lesson in lessons[1:]:
        model = teach(learner(name, model, ratio), plan(lesson, seed), rate)
        grid.append([accuracy(model, rows) for rows in tests])
    return Outcome(grid)


def tuned(name: str, steps: int, ratio: float) -> tuple[float, list[Json]]:
    """Return the learning rate at which a method learns the first new task best, and what every rate gave."""
    tried: list[Json] = []
    best, best_key = 0.0, (-1.0, -1.0)
    for rate in GRIDS[name]:
        found = sequence(name, rate, TUNING_SEED, steps, ratio, num_tasks=2)
        print(f"  {name}, rate {rate:g}: learnt {found.learnt:.2f}, kept {found.kept:.2f}", flush=True)
        tried.append({"rate": rate, "learnt": found.learnt, "kept": found.kept, "average": found.average})
        if (found.learnt, found.average) > best_key:
            best, best_key = rate, (found.learnt, found.average)
    return best, tried


def leaks(names: Sequence[str], steps: int, ratio: float) -> dict[str, float]:
    """Return what each orthogonal method leaks while it learns to shout, at one learning rate, with weight decay."""
    plain = embedded()[1]
    steps_of = plan(conversations(TASKS[1], steps * BATCH, seed=1), seed=1)
    found = {}
    for name in names:
        after = teach(learner(name, plain, ratio), steps_of, rate=1e-3, weight_decay=0.1)
        found[name] = leak(plain, after, ratio)
    return found


def measure(name: str, seeds: Sequence[int], steps: int, ratio: float) -> dict[str, Json]:
    """Tune one method, run it with every seed, and return its figures."""
    start = time.process_time()
    rate, tried = tuned(name, steps, ratio)
    found = [sequence(name, rate, seed, steps, ratio) for seed in seeds]
    plain = embedded()[1]
    stages = range(len(TASKS))
    grid = [[statistics.mean(one.grid[stage][task] for one in found) for task in stages] for stage in stages]
    return {
        "rate": rate,
        "trained": sum(parameter.numel() for parameter in learner(name, plain, ratio).trained),
        "accuracy": [[round(value, 4) for value in row] for row in grid],
        **{
            key: round(statistics.mean(getattr(one, key) for one in found), 4)
            for key in ("average", "learnt", "kept", "backward_transfer")
        },
        "average_spread": round(max(one.average for one in found) - min(one.average for one in found), 4),
        "cpu_seconds": round(time.process_time() - start, 1),
        "tried": tried,
    }


def report(figures: dict[str, dict[str, Json]], leaked: dict[str, float]) -> None:
    """Print what every method knows after each stage, and what it leaks."""
    rows = []
    for name, line in figures.items():
        accuracies = [" ".join(f"{value:.2f}" for value in row) for row in cast("list[list[float]]", line["accuracy"])]
        shown = [f"{line[key]:.3f}" for key in ("average", "learnt", "kept", "backward_transfer")]
        rows.append((name, f"{line['rate']:g}", line["trained"], *accuracies[1:], *shown))
    print("\naccuracy on: known, shout, double")
    table(("method", "rate", "trained", "after shout", "after double", "average", "learnt", "kept", "transfer"), rows)
    print()
    table(("method", "largest leak"), [(name, f"{value:.1e}") for name, value in leaked.items()])


def main() -> None:
    """Tune, run and report all methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300, help="steps of each stage")
    parser.add_argument("--leak-steps", type=int, default=200)
    parser.add_argument("--ratio", type=float, default=0.25, help="share of the singular directions that may train")
    parser.add_argument("--only", choices=NAMES, nargs="*", default=NAMES)
    parser.add_argument("--quick", action="store_true", help="one seed and a few steps, to see that it runs; no record")
    given = parser.parse_args()
    if given.quick:
        given.seeds, given.steps, given.leak_steps = 1, 4, 20
        GRIDS.update({name: rates[:1] for name, rates in GRIDS.items()})
    os.environ.update(ONE_THREAD)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*requires_grad=True to a scalar.*")
    leaked = leaks([name for name in ORTHOGONAL if name in given.only], given.leak_steps, given.ratio)
    figures = {name: measure(name, range(given.seeds), given.steps, given.ratio) for name in given.only}
    report(figures, leaked)
    if not given.quick:
        settings: dict[str, Json] = {"seeds": given.seeds, "steps": given.steps, "ratio": given.ratio}
        record(
            "forgetting", {**settings, "leak_steps": given.leak_steps, "methods": dict(figures), "leak": dict(leaked)}
        )


if __name__ == "__main__":
    main()
