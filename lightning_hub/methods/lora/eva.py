"""The init ``eva``: ``A`` starts at the main directions of its layer's inputs (arXiv 2410.07170), through peft."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from peft import EvaConfig, LoraConfig, get_eva_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_hub.errors import ConfigError
from lightning_hub.methods.lora.adapters import ADAPTER_NAME, EVA, INIT_OPTION, layers_of
from lightning_hub.ops.batch import IGNORE_INDEX, PackedSequence, StepBatch
from lightning_hub.ops.loss import ModelCapabilities, forwards_of, inputs_of

FORWARDS = 1000
"""The largest number of forwards; if the directions have not converged by then, there is an error."""


class StepSource(Protocol):
    """The steps of a run, by epoch and number."""

    def __len__(self) -> int:
        """Return the number of steps of one epoch."""

    def step(self, epoch: int, index: int, rank: int = 0, world_size: int = 1) -> StepBatch:
        """Return one step, of one rank; of all ranks by default."""


@dataclass(frozen=True)
class PackedRows:
    """The packed rows of the first epoch of all ranks, in order, so that the result does not depend on the topology.

    It yields only rows with at least ``least`` trained tokens, which is the rank of the adapters.
    """

    steps: StepSource
    capabilities: ModelCapabilities
    least: int

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[PackedSequence]:
        for index in range(len(self.steps)):
            for row in self.steps.step(0, index).rows:
                for part in forwards_of(row, self.capabilities):
                    if (part.labels != IGNORE_INDEX).sum() >= self.least:
                        yield part


def eva_directions(
    model: PreTrainedModel, capabilities: ModelCapabilities, config: LoraConfig, steps: StepSource
) -> dict[str, Tensor]:
    """Return the main directions of the inputs of each target layer, computed by peft.

    It uses trained tokens only, and takes packed rows until the directions have converged. Each layer keeps the rank
    of the recipe: ranks that depend on the data would give another model in every topology.

    Args:
        model: The loaded model without adapters, on the device that computes.
        capabilities: How the model can run.
        config: The configuration of its adapters.
        steps: The steps of the run.

    Returns:
        For each layer an orthonormal matrix of shape ``(rank, inputs)``.

    Raises:
        ConfigError: A target is not a linear layer, every packed row has too few trained tokens, or the directions do
            not converge.
    """
    layers = [
        name for name in config.target_modules or () if isinstance(model.get_submodule(name), (nn.Linear, Conv1D))
    ]
    if others := sorted({*(config.target_modules or ()), *(config.target_parameters or ())} - {*layers}):
        message = f"init eva is for linear layers, not for {others[0]}"
        raise ConfigError(message, where=INIT_OPTION, remedy="use another init, or remove the layer from targets")
    rows = PackedRows(steps, capabilities, config.r)
    if next(iter(rows), None) is None:
        message = f"no packed row has {config.r} trained tokens, which init eva needs for rank {config.r}"
        raise ConfigError(
            message,
            where=INIT_OPTION,
            remedy="use longer packed rows (max_tokens_per_gpu), a smaller r, or another init",
        )
    num_forwards = 0

    def forward(model: PreTrainedModel, row: PackedSequence) -> None:
        nonlocal num_forwards
        num_forwards += 1
        if num_forwards > FORWARDS:
            message = f"the directions of init eva have not converged after {FORWARDS} packed rows"
            raise ConfigError(message, where=INIT_OPTION, remedy="use another init")
        model(**inputs_of(model, row, capabilities.isolates_documents))

    plain = LoraConfig(
        r=config.r,
        target_modules=config.target_modules,
        init_lora_weights=EVA,  # type: ignore[arg-type]  # a value that peft knows
        eva_config=EvaConfig(rho=1.0),
    )
    try:
        found = get_eva_state_dict(
            model,
            cast("Sequence[PackedSequence]", rows),
            plain,
            forward_fn=forward,
            prepare_model_inputs_fn=lambda row, _: (row.labels != IGNORE_INDEX).flatten(),
            prepare_layer_inputs_fn=lambda given, trained, _: given[0].flatten(0, -2)[trained],
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"peft finds no directions in this data ({reason})", where=INIT_OPTION, remedy="use another init"
        ) from error
    return cast("dict[str, Tensor]", found)


@torch.no_grad()
def set_directions(model: PreTrainedModel, found: dict[str, Tensor]) -> None:
    """Copy the directions into the ``A`` of each layer; every ``B`` stays zero."""
    for name, layer in layers_of(model):
        cast("Tensor", layer.lora_A[ADAPTER_NAME].weight).copy_(found[name])
