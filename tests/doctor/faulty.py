"""Faults to put into a process, and so into those that are forked from it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace(module: Any, name: str, new: object) -> None:
    """Put something in the place of a function, also where that was imported from its module."""
    old = getattr(module, name)
    for loaded in [one for path, one in sys.modules.items() if path.startswith("lightning_hub.")]:
        for imported in [key for key, value in vars(loaded).items() if value is old]:
            setattr(loaded, imported, new)


def none() -> None:
    """Nothing: the program as it is."""


def leak() -> None:
    """Attention over the whole row, as if it were one document."""
    from lightning_hub.ops import attention

    module: Any = attention
    module.pairwise = lambda boundaries: [(boundaries[0], boundaries[-1])]  # this one's alone: it is itertools'


def leak_after_the_proof() -> None:
    """The same, in a process that takes packed attention for proven."""
    from lightning_hub.ops import attention_proof

    leak()
    replace(attention_proof, "_failure", lambda *_: None)


def mean_of_means() -> None:
    """Each row's mean, averaged over the rows."""
    from lightning_hub.methods.sft import SFT

    def row_loss(self: SFT, row: Any, step: Any) -> Any:
        assert self.loss_head is not None
        return self.loss_head(row) / (len(step.rows) * (row.labels != -100).sum())

    SFT.row_loss = row_loss  # type: ignore[method-assign, assignment]


def world_forgotten() -> None:
    """Losses without the factor that cancels the mean over the ranks."""
    from lightning_hub.methods import causal_lm
    from lightning_hub.parallel.data_parallel import DataParallel

    module: Any = causal_lm
    module.data_parallel = lambda strategy: DataParallel()


def rank_dies() -> None:
    """Rank 1 raises in its first step, while rank 0 waits for it."""
    from lightning_hub.doctor.recorded_run import RecordingSFT

    def die(self: RecordingSFT, *_: object) -> None:
        if self.trainer.global_rank == 1:
            raise RuntimeError("rank 1 has had enough")

    RecordingSFT.on_before_optimizer_step = die  # type: ignore[method-assign, assignment]


def altered_checkpoint() -> None:
    """One number of one tensor differs by the smallest step when a checkpoint is read."""
    import torch

    from lightning_hub.checkpoints.tensors import Shard, TensorReader

    fill, altered_names = TensorReader.fill, set[str]()

    def altered(self: TensorReader, name: str, shard: Shard) -> None:
        fill(self, name, shard)
        if not altered_names:
            altered_names.add(name)
            number = shard.data.view(-1)[:1]
            number.copy_(torch.nextafter(number, number + 1))

    TensorReader.fill = altered  # type: ignore[method-assign]


def random_state_lost() -> None:
    """Random states are not restored."""
    from lightning_hub.checkpoints.checkpoint_io import CheckpointTensors

    CheckpointTensors.restore_random = lambda self, share: None  # type: ignore[method-assign]


def altered_export() -> None:
    """One weight of the exported folder is a thousandth too large."""
    from safetensors.torch import load_file, save_file

    from lightning_hub.checkpoints import export

    write = export.write_export

    def altered(target: Path, *rest: Any, **named: Any) -> None:
        write(target, *rest, **named)
        tensors = load_file(target / "model.safetensors")
        next(iter(tensors.values())).mul_(1.001)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})

    replace(export, "write_export", altered)


ALL = (
    none,
    leak,
    leak_after_the_proof,
    mean_of_means,
    world_forgotten,
    rank_dies,
    altered_checkpoint,
    random_state_lost,
    altered_export,
)
FAULTS: dict[str, Callable[[], None]] = {fault.__name__: fault for fault in ALL}
