"""Trainings that save and resume, as one rank runs them: several in one start of the processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lightning_hub.callbacks.checkpoint_saver import CheckpointSaver
from lightning_hub.checkpoints.checkpoint_io import FolderCheckpointIO
from lightning_hub.checkpoints.settings import CheckpointSettings
from lightning_hub.data.datamodule import ChatData
from lightning_hub.methods.causal_lm import CausalLMModule
from lightning_hub.methods.run_context import RunContext, run_context
from lightning_hub.methods.sft import SFT
from lightning_hub.ops.batch import IGNORE_INDEX, StepBatch
from lightning_hub.parallel.strategies import DDP, FSDP, ModelParallel
from tests.parallel.multiprocess import Topology, make_trainer

TOPOLOGIES = {
    "single": Topology("single", 1, partial(str, "auto")),
    "ddp": Topology("ddp", 2, DDP),
    "fsdp": Topology("fsdp", 2, FSDP),
    "tp": Topology("tp", 2, partial(ModelParallel, ([1, 2], ["fsdp", "tp"]))),
    "ddp x 4": Topology("ddp x 4", 4, DDP),
    "fsdp 2 x tp 2": Topology("fsdp 2 x tp 2", 4, partial(ModelParallel, ([2, 2], ["fsdp", "tp"]))),
}


@dataclass(frozen=True)
class ResumeCase:
    """One training with checkpoints.

    Attributes:
        topology: How it is spread.
        data: The rows it trains on.
        folder: Where it saves.
        model: What it trains.
        resume: The checkpoint that it resumes from.
        workers: Loader workers.
        kind: The method.
        method: Further options of the method.
        trainer: Further options of the trainer.
        settings: When it saves.
    """

    topology: str
    data: Path
    folder: Path
    model: str = "demo"
    resume: Path | None = None
    workers: int = 0
    kind: type[CausalLMModule] = SFT
    method: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=partial(dict, every_n_steps=1, keep=99))


@dataclass
class Outcome:
    """What one rank has seen of a story, by step.

    Attributes:
        weights: Final weights (rank 0).
    """

    losses: dict[int, float] = field(default_factory=dict)
    samples: dict[int, list[int]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


class Watch(Callback):
    """Notes losses and samples."""

    def __init__(self) -> None:
        self.outcome = Outcome()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: object, batch: StepBatch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self.outcome.losses[step] = float(pl_module.step_loss)
        trained = [row for row in batch.rows if bool((row.labels != IGNORE_INDEX).any())]
        self.outcome.samples[step] = [sample for row in trained for sample in row.sample_ids]


def prepare(story: ResumeCase, *callbacks: Callback) -> tuple[Trainer, CausalLMModule, ChatData]:
    """Return what a story needs to run."""
    facts: dict[str, str] = {}
    saver = CheckpointSaver(
        CheckpointSettings(**story.settings),
        story.folder,
        facts,
        request=lambda: None,
        on_saved=lambda step, path: None,
    )
    trainer = make_trainer(
        TOPOLOGIES[story.topology],
        enable_checkpointing=True,
        plugins=[FolderCheckpointIO(facts)],
        callbacks=[*callbacks, saver],
        **{"max_epochs": 2, **story.trainer},
    )
    torch.manual_seed(0)
    with run_context(RunContext(resume_from=story.resume)):
        module = story.kind(story.model, **{"learning_rate": 3e-4, **story.method})
    data = ChatData(str(story.data), val=0.2, max_seq_len=64, effective_batch_size=8, num_workers=story.workers, seed=1)
    return trainer, module, data


def run_case(story: ResumeCase, *callbacks: Callback) -> Outcome:
    """Train a story in this process, which is one rank of its topology."""
    watch = Watch()
    trainer, module, data = prepare(story, watch, *callbacks)
    trainer.fit(module, data, ckpt_path=story.resume)
    watch.outcome.weights = {name: tensor.clone() for name, tensor in module.export_state()[1].items()}
    return watch.outcome


def run_cases(stories: list[ResumeCase]) -> list[Outcome]:
    """Train one story after another."""
    return [run_case(story) for story in stories]
