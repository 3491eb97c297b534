"""The small training that proofs compare. It uses the real step, data and strategies, on a model with small weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.optim import Optimizer

from lightning_hub.data.datamodule import ChatData
from lightning_hub.doctor.sample_data import ROWS
from lightning_hub.methods.sft import SFT
from lightning_hub.models.pretrained import Pretrained
from lightning_hub.ops.batch import StepBatch
from lightning_hub.parallel.data_parallel import data_parallel
from lightning_hub.parallel.process_group import HubClusterEnvironment


@dataclass(frozen=True)
class ProofFiles:
    """The files that the processes of a proof share, in one folder."""

    folder: Path

    @property
    def rows(self) -> Path:
        """The conversations; this file exists already."""
        return self.folder / ROWS

    @property
    def model(self) -> Path:
        """The model to train."""
        return self.folder / "model"

    @property
    def reference(self) -> Path:
        """The recorded training of one process."""
        return self.folder / "reference.pt"

    def make_model(self) -> None:
        """Write the embedded model with every weight multiplied by 0.5.

        The trained model gives its answers a probability near 1. Then float32 rounding alone changes a gradient by
        more than 1e-5, even between two ways of packing in one process.
        """
        pretrained = Pretrained("demo")
        model = pretrained.load(dtype=torch.float32, attn_implementation="sdpa")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        model.save_pretrained(self.model)
        pretrained.tokenizer.save_pretrained(self.model)

    def data(self) -> ChatData:
        """Return the conversations in packed rows of 96 tokens, eight samples in each step."""
        return ChatData(str(self.rows), max_seq_len=96, effective_batch_size=8, shuffle=False)


@dataclass
class RecordedRun:
    """The record of a training: the loss, gradient norm and optional gradients of each step, and the final weights."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


class RecordingSFT(SFT):
    """SFT that records its losses, gradient norms and gradients.

    Args:
        model: The folder of the model.
        learning_rate: With 0 the weights do not change and all gradients are recorded.
    """

    def __init__(self, model: str, learning_rate: float) -> None:
        super().__init__(model, learning_rate=learning_rate, lr_scheduler="linear")
        self.seen = RecordedRun()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Record the gradients before they are clipped."""
        if self.learning_rate == 0:
            found = {name: parameter.grad for name, parameter in self.named_parameters()}
            self.seen.gradients.append({name: grad.clone() for name, grad in found.items() if grad is not None})

    def on_train_batch_end(self, outputs: object, batch: StepBatch, batch_idx: int) -> None:
        """Record the loss of the complete step and the norm of its gradient."""
        assert self.grad_norm is not None, "every step is logged"
        self.seen.losses.append(float(data_parallel(self.trainer.strategy).mean(self.step_loss)))
        self.seen.norms.append(float(self.grad_norm))


def train_recorded(
    material: ProofFiles,
    accelerator: str,
    strategy: str | Strategy = "auto",
    environment: HubClusterEnvironment | None = None,
    learning_rate: float = 3e-4,
) -> tuple[RecordingSFT, ChatData]:
    """Train one epoch in float32 and return the module, which has the record, and its data.

    Every rank must call this; only rank 0 gets the final weights.

    Args:
        material: The model and the data.
        accelerator: ``cpu`` or ``cuda``.
        strategy: The strategy of Lightning.
        environment: The rank and world size of this process; None in a single process.
        learning_rate: With 0 the weights do not change.
    """
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    module, data = RecordingSFT(str(material.model), learning_rate), material.data()
    trainer = Trainer(
        accelerator=accelerator,
        devices=environment.world_size() if environment else 1,
        strategy=strategy,
        plugins=environment,
        max_epochs=1,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, data)
    module.seen.weights = {name: tensor.detach().clone().cpu() for name, tensor in module.export_state()[1].items()}
    return module, data


def accelerator() -> str:
    """Return the accelerator for the ranks of a proof: ``cuda`` with at least two GPUs, else ``cpu``."""
    return "cuda" if torch.cuda.device_count() >= 2 else "cpu"


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the norm of the difference between two sets of tensors, relative to the norm of the second set."""
    difference = [one.float() - other.float() for one, other in zip(found, expected, strict=True)]
    return float(torch.nn.utils.get_total_norm(difference) / torch.nn.utils.get_total_norm(expected))


def worst_distance(found: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest relative difference between two lists of numbers, element by element."""
    return max_distance([abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True)])


def max_distance(errors: Sequence[float]) -> float:
    """Return the largest error, or NaN if one is NaN. Python's ``max`` can ignore a NaN."""
    return float(torch.tensor(errors, dtype=torch.float64).max())
