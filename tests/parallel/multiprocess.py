"""Starts a topology once, trains every case in it, and brings back what each rank has seen."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from lightning_hub.data.sample_store import SampleStore
from lightning_hub.data.step_plan import BatchSettings, StepLoader, StepPlan
from lightning_hub.demo.tasks import REVERSE, SHOUT, SPELL, conversations
from lightning_hub.methods.causal_lm import CausalLMModule
from lightning_hub.methods.sft import SFT
from lightning_hub.models.pretrained import Pretrained
from lightning_hub.ops.batch import StepBatch
from lightning_hub.parallel.data_parallel import data_parallel
from lightning_hub.parallel.dtensor import local_tensor
from tests.warm import as_own_process, warm_context

T = TypeVar("T")

TIME_LIMIT = 900.0
"""Seconds after which a topology's processes are ended."""


@dataclass(frozen=True)
class Topology:
    """Processes and how they work together."""

    name: str
    world_size: int
    strategy: Callable[[], Strategy | str]


@dataclass(frozen=True)
class Case:
    """One training: a method with its options, a model, and the options of the trainer.

    Attributes:
        tolerance: The largest relative difference to one process of losses, gradient norms and weights.
    """

    name: str
    method: type[CausalLMModule] = SFT
    model: str = "demo"
    options: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-5


@dataclass
class Seen:
    """What one rank has seen of one training.

    Attributes:
        empty: For each step whether this rank had nothing of its own to do.
        start: Weights (rank 0) and buffers before the first step.
        parts: Numbers of the model that this rank holds.
        exchanges: How often a group of sharded weights exchanged gradients.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    empty: list[bool] = field(default_factory=list)
    val_loss: float = 0.0
    start: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    parts: int = 0
    exchanges: int = 0


@cache
def plan() -> StepPlan:
    """Ten steps of eight uneven samples in rows of 96 tokens; the last is partial: two samples in one row.

    Untrained tokens prolong each sample to a multiple of eight, so that there are few lengths of rows: under tensor
    parallelism torch decides again how to run each operation for every new length.
    """
    tokenizer = Pretrained("demo").tokenizer
    pairs = []
    for talk in conversations((SPELL, REVERSE, SHOUT), 74, seed=3):
        turns = talk["messages"]
        asked = _ids(tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False))
        whole = _ids(tokenizer.apply_chat_template(turns, return_dict=False))
        labels, more = [-100] * len(asked) + whole[len(asked) :], -len(whole) % 8
        pairs.append((whole + whole[-1:] * more, labels + [-100] * more))
    return StepPlan(SampleStore.from_pairs(pairs), BatchSettings(96, 8, None, shuffle=False, seed=0))


@cache
def calm() -> str:
    """Return a folder with the embedded model at half of its weights.

    As it was trained it is so sure of its answers that float32 rounding alone moves a gradient by more than 1e-5,
    also between two ways of packing in one process.
    """
    folder = mkdtemp(prefix="calm-")
    demo = Pretrained("demo")
    model = demo.load(dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    model.save_pretrained(folder)
    demo.tokenizer.save_pretrained(folder)
    return folder


def _ids(rendered: object) -> list[int]:
    """Narrow what a template may return to token ids."""
    assert isinstance(rendered, list)
    return rendered


def make_trainer(topology: Topology, **options: Any) -> Trainer:
    """Return a quiet trainer, for one epoch where nothing else is said."""
    quiet: dict[str, Any] = {
        "max_epochs": 1,
        "use_distributed_sampler": False,
        "log_every_n_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    chosen = {"accelerator": "cpu", "devices": topology.world_size, "strategy": topology.strategy()}
    return Trainer(**{**quiet, **chosen, **options})


def trained(case: Case, topology: Topology) -> Seen:
    """Train a case in this process, which is one rank of the topology."""
    seen = Seen()

    class Watched(case.method):  # type: ignore[name-defined, misc]
        def configure_model(self) -> None:
            super().configure_model()
            if not seen.start:
                model, seen.start = self.export_state()
                seen.start |= {name: buffer.clone() for name, buffer in model.named_buffers()}
                seen.start = {name: tensor.clone() for name, tensor in seen.start.items()}
                seen.parts = sum(local_tensor(parameter).numel() for parameter in model.parameters())

        def on_train_batch_end(self, outputs: object, batch: StepBatch, batch_idx: int) -> None:
            super().on_train_batch_end(outputs, batch, batch_idx)
            seen.losses.append(float(data_parallel(self.trainer.strategy).mean(self.step_loss)))
            seen.norms.append(float(self.grad_norm))
            seen.rows.append(len(batch.rows))
            seen.empty.append(not any((row.labels != -100).any() for row in batch.rows))

        def on_validation_epoch_end(self) -> None:
            seen.val_loss = self._mean_loss()

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.exchanges += 1
        return exchange(*args, **kwargs)

    fsdp: Any = _fsdp_param_group  # its reductions have no public door
    exchange, fsdp.foreach_reduce = fsdp.foreach_reduce, counted
    torch.manual_seed(0)
    module = Watched(case.model, **{"learning_rate": 3e-4, "lr_scheduler": "linear", **case.options})
    trainer = make_trainer(topology, **case.trainer)
    trainer.fit(module, Shares(trainer), Shares(trainer, start=7))
    fsdp.foreach_reduce = exchange
    seen.weights = {name: tensor.clone() for name, tensor in module.export_state()[1].items()}
    return seen


class Shares:
    """The steps of this rank from one on, known once the trainer's strategy is."""

    def __init__(self, trainer: Trainer, start: int = 0) -> None:
        self.trainer = trainer
        self.start = start

    def __len__(self) -> int:
        return len(plan()) - self.start

    def __iter__(self) -> Any:
        shares = data_parallel(self.trainer.strategy)
        return iter(StepLoader(plan(), lambda: (0, self.start), shares.rank, shares.size))


def launch(topology: Topology, cases: list[Case], folder: Path) -> list[dict[str, Seen | str]]:
    """Return for each rank what it has seen of each case, or a case's traceback."""
    if topology.world_size == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as ranks have: sums in another order are other numbers
        try:
            return [_train(topology, cases)]
        finally:
            torch.set_num_threads(threads)
    return processes(topology.world_size, partial(_train, topology, cases), folder)


def _train(topology: Topology, cases: list[Case]) -> dict[str, Seen | str]:
    found: dict[str, Seen | str] = {}
    for case in cases:
        try:
            found[case.name] = trained(case, topology)
        except Exception:  # the test of this case reports it; the other ranks may wait for this one, so it is the last
            found[case.name] = traceback.format_exc()
            break
    return found


def processes(world_size: int, work: Callable[[], T], folder: Path) -> list[T]:
    """Run a function as every rank of a world and return what each rank's returned.

    Args:
        world_size: How many ranks.
        work: What each does; it must be importable.
        folder: Where results travel.
    """
    end = time.monotonic() + TIME_LIMIT
    ranks = started(world_size, work, folder)
    try:
        for process in ranks:
            process.join(max(0.0, end - time.monotonic()))
        hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    finally:  # no daemons, which may not start loader workers
        for process in ranks:
            process.kill()
    assert not hung, f"ranks {hung} did not end within {TIME_LIMIT} s"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def started(world_size: int, work: Callable[[], object], folder: Path) -> list[ForkServerProcess]:
    """Return the processes that run a function as every rank of a world; the caller ends them."""
    context = warm_context()
    port = _free_port()
    ranks = [context.Process(target=_rank, args=(rank, world_size, port, work, folder)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    return ranks


def _rank(rank: int, world_size: int, port: int, work: Callable[[], object], folder: Path) -> None:
    """Be one rank, as torchrun would have started it."""
    world = str(world_size)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE=world, LOCAL_WORLD_SIZE=world,
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test", OMP_NUM_THREADS="1",
    )  # fmt: skip
    os.environ.pop("PL_GLOBAL_SEED", None)  # of an earlier test, which Lightning would seed the ranks with
    as_own_process()
    torch.save(work(), folder / f"{rank}.pt")
    os._exit(0)  # the group's threads may wait for a rank that failed


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
