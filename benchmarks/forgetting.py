"""What a model still knows after it has learnt two further tasks, one after the other, by several methods.

There are two scenes. ``room``: a model made for the purpose, whose weights have directions that its first task does not
use, and tasks of alphabets of their own. ``embedded``: the model that the package brings along, which uses all it has,
and new questions about the same words. Each stage begins with the plain model that the stage before has left, as
``fit --model RUN/export`` does. All methods take the same steps over the same rows.

Every method gets its learning rate by one rule, on a seed that is used for nothing else: the rate with the best average
over all tasks at the end, which weighs what is kept and what is learnt alike. A method that can only do one of the two
is best where it keeps all and learns nothing, or the other way round: then its average is a third. What every rate gave
is told and recorded, so that another rule can be tried, such as the rate at which most is learnt.

At last, what the orthogonal methods leak into directions that they promise to leave alone: the largest share of any
weight's change.

usage: python -m benchmarks.forgetting [--scene room|embedded] [--seeds 5] [--steps 300] [--quick]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import cast

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from benchmarks.keepers import FEWER, NAMES, ORTHOGONAL, PEER, PEERS, Chain, Learner, leak, learner
from benchmarks.records import ONE_THREAD, record, table
from benchmarks.scenes import SCENES, Embedded, Room, Scene, room_left
from lightning_hub.data.step_plan import StepPlan
from lightning_hub.methods.schedule import Schedule
from lightning_hub.ops.loss import CausalLMLoss, ModelCapabilities
from lightning_hub.runs.files import Json

GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "room": {
        "sft": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
        "sft targets": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
        "lora": (3e-4, 1e-3, 3e-3, 1e-2),
        "osft": (3e-4, 1e-3, 3e-3, 1e-2),
        "osft thin": (3e-4, 1e-3, 3e-3, 1e-2),
        "peft osf": (3e-4, 1e-3, 3e-3, 1e-2),
        "factors": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
        "mini-trainer": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
        "osft chained": (3e-4, 1e-3, 3e-3, 1e-2),
        **dict.fromkeys(FEWER, (0.0001, 0.0003, 0.001, 0.003, 0.01)),
    },
    "embedded": {
        "sft": (3e-4, 1e-3, 2e-3),
        "sft targets": (3e-4, 1e-3, 2e-3),
        "lora": (1e-3, 3e-3, 1e-2),
        "osft": (3e-3, 1e-2, 3e-2),
        "osft thin": (3e-3, 1e-2, 3e-2),
        "peft osf": (1e-3, 3e-3, 1e-2),
        "factors": (1e-3, 3e-3, 1e-2),
        "mini-trainer": (1e-3, 3e-3, 1e-2),
        "osft chained": (3e-3, 1e-2, 3e-2),
        **dict.fromkeys(FEWER, (0.001, 0.003, 0.01)),
    },
}
"""Learning rates that are tried: the forms differ by factors in how far a step moves a weight."""

TUNING_SEED = 1000


@dataclass(frozen=True)
class Outcome:
    """Accuracy on each task, after each stage.

    Attributes:
        grid: ``grid[stage][task]``; stage 0 is the model before anything is learnt.
        trained: How many numbers the optimizer has moved in each stage.
    """

    grid: list[list[float]]
    trained: list[int]

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


FIGURES = ("average", "learnt", "kept", "backward_transfer")
"""What is told of outcomes."""


def teach(
    taught: Learner, steps: StepPlan, rate: float, capabilities: ModelCapabilities, weight_decay: float = 0.0
) -> PreTrainedModel:
    """Train for one pass over the steps and return the plain model that comes out."""
    head = CausalLMLoss(taught.model, capabilities=capabilities)
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
        taught.before_step()
        optimizer.step()
        schedule.step()
        taught.after_step()
    return taught.merged().requires_grad_(False)


def stages(scene: Scene, name: str, rate: float, seed: int, steps: int) -> Iterator[tuple[PreTrainedModel, int]]:
    """Teach the new tasks one after another; yield the model after each, and how many numbers have trained."""
    torch.manual_seed(seed)
    model, places = scene.model(seed), range(1, len(scene.tasks))
    with tempfile.TemporaryDirectory() as folder:
        chain = Chain(Path(folder), len(places))
        for place in places:
            taught = learner(name, model, scene.ratio, chain)
            trained = sum(parameter.numel() for parameter in taught.trained)
            model = teach(taught, scene.lesson(place, seed, steps), rate, scene.capabilities())
            yield model, trained


def sequence(scene: Scene, name: str, rate: float, seed: int, steps: int) -> Outcome:
    """Teach the new tasks one after another, and test all after each."""

    def tested(model: PreTrainedModel) -> list[float]:
        return [scene.test(model, place, seed) for place in range(len(scene.tasks))]

    found = [(tested(model), trained) for model, trained in stages(scene, name, rate, seed, steps)]
    grid, trained = zip(*found, strict=True)
    return Outcome([tested(scene.model(seed)), *grid], list(trained))


def best(tried: Sequence[tuple[float, Outcome]]) -> float:
    """Return the rate with the best average at the end; of equal ones, that at which more is learnt."""
    return max(tried, key=lambda one: (one[1].average, one[1].learnt))[0]


def tuned(scene: Scene, name: str, rates: Sequence[float], steps: int) -> tuple[float, list[Json]]:
    """Return the learning rate of a method, and what every rate gave."""
    tried = []
    for rate in rates:
        outcome = sequence(scene, name, rate, TUNING_SEED, steps)
        print(f"  {name}, {rate:g}:", *(f"{key} {getattr(outcome, key):.2f}" for key in FIGURES), flush=True)
        tried.append((rate, outcome))
    return best(tried), [
        {"rate": rate, **{key: round(getattr(outcome, key), 4) for key in FIGURES}} for rate, outcome in tried
    ]


def leaks(names: Sequence[str], steps: int, ratio: float = 0.25) -> dict[str, float]:
    """Return what each orthogonal method leaks while it learns to shout, at one learning rate, with weight decay."""
    scene = Embedded()
    plain, lesson = scene.model(1), scene.lesson(1, 1, steps)
    found = {}
    for name in names:
        after = teach(learner(name, plain, ratio), lesson, 1e-3, scene.capabilities(), weight_decay=0.1)
        found[name] = leak(plain, after, ratio)
        print(f"  {name} leaks {found[name]:.1e}", flush=True)
    return found


def measure(scene: Scene, name: str, rates: Sequence[float], seeds: Sequence[int], steps: int) -> dict[str, Json]:
    """Tune one method, run it with every seed, and return its figures."""
    start = time.process_time()
    rate, tried = tuned(scene, name, rates, steps)
    found = [sequence(scene, name, rate, seed, steps) for seed in seeds]
    stages = range(len(scene.tasks))
    grid = [[statistics.mean(one.grid[stage][task] for one in found) for task in stages] for stage in stages]
    figures: dict[str, Json] = {}
    for key in FIGURES:
        values = [getattr(one, key) for one in found]
        figures |= {
            key: round(statistics.mean(values), 4),
            f"{key}_range": [round(min(values), 4), round(max(values), 4)],
        }
    return {
        "rate": rate,
        "trained": max(found[0].trained),
        "kept_by_seed": [round(one.kept, 4) for one in found],
        "accuracy": [[round(value, 4) for value in row] for row in grid],
        **figures,
        "cpu_seconds": round(time.process_time() - start, 1),
        "tried": tried,
    }


def report(scene: Scene, figures: dict[str, dict[str, Json]]) -> None:
    """Print what every method knows after each stage."""
    rows = []
    for name, line in figures.items():
        accuracies = [" ".join(f"{value:.2f}" for value in row) for row in cast("list[list[float]]", line["accuracy"])]
        shown = [f"{line[key]:.3f}" for key in FIGURES]
        spread = "-".join(f"{value:.2f}" for value in cast("list[float]", line["kept_range"]))
        rows.append((name, f"{line['rate']:g}", line["trained"], *accuracies[1:], *shown, spread))
    print(f"\naccuracy on: {', '.join(scene.tasks)}")
    head = (
        "method",
        "rate",
        "trained",
        *(f"after {task}" for task in scene.tasks[1:]),
        *FIGURES[:3],
        "transfer",
        "kept",
    )
    table(head, rows)


def room_of(scene: Scene, seeds: Sequence[int]) -> list[Json]:
    """Print and return how much the models use their smallest quarter and half of directions for what they know."""
    found: list[Json] = []
    for ratio in (0.25, 0.5):
        shares: list[tuple[float, float]] = []
        most: list[Json] = []
        for seed in seeds:
            model, ask = scene.model(seed), partial(scene.test, scene.model(seed), 0, seed)
            layers = room_left(model, ask, ratio)
            shares += layers.values()
            worst = max(layers, key=lambda name: layers[name][1])
            most.append([worst, round(layers[worst][1], 4)])
        weights, inputs = zip(*shares, strict=True)
        line: dict[str, Json] = {"smallest": ratio, "weights": statistics.mean(weights)}
        line |= {"inputs": statistics.mean(inputs), "weights_max": max(weights), "inputs_max": most}
        print("  use of directions:", ", ".join(f"{key} {value}" for key, value in line.items()), flush=True)
        found.append(line)
    return found


def main() -> None:
    """Tune, run and report all methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scene", choices=list(SCENES), default="room")
    parser.add_argument("--seeds", type=int, default=5, help="0 measures the leaks alone")
    parser.add_argument("--steps", type=int, default=300, help="steps of each stage")
    parser.add_argument("--leak-steps", type=int, default=200, help="0 leaves the leaks out")
    parser.add_argument("--rates", type=float, nargs="*", help="learning rates to try instead of each method's own")
    parser.add_argument("--only", choices=NAMES, nargs="*", default=NAMES)
    parser.add_argument("--quick", action="store_true", help="one seed and a few steps, to see that it runs; no record")
    given = parser.parse_args()
    if given.quick:
        given.seeds, given.steps, given.leak_steps = 1, 4, min(20, given.leak_steps)
        GRIDS[given.scene] = {name: rates[:1] for name, rates in GRIDS[given.scene].items()}
    os.environ.update(ONE_THREAD)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*requires_grad=True to a scalar.*")
    scene, seeds = SCENES[given.scene](), range(given.seeds)
    if given.quick and isinstance(scene, Room):
        scene = Room(steps=10)
    if not PEERS:
        print(f"{PEER} cannot be imported here: it is left out")
    leaked = leaks([name for name in ORTHOGONAL if name in given.only], given.leak_steps) if given.leak_steps else {}
    left = room_of(scene, seeds) if seeds else None
    rates = GRIDS[given.scene]
    figures = {
        name: measure(scene, name, given.rates or rates[name], seeds, given.steps) for name in given.only if seeds
    }
    if figures:
        report(scene, figures)
    if leaked:
        print()
        table(("method", "largest leak"), [(name, f"{value:.1e}") for name, value in leaked.items()])
    if not given.quick:
        settings: dict[str, Json] = {
            "scene": given.scene,
            "ratio": scene.ratio,
            "seeds": given.seeds,
            "steps": given.steps,
        }
        settings |= {"leak_steps": given.leak_steps, PEER: version("rhai-innovation-mini-trainer") if PEERS else None}
        record("forgetting", {**settings, "room": left, "methods": dict(figures), "leak": dict(leaked)})


if __name__ == "__main__":
    main()
