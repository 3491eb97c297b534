"""The init ``eva``: each ``A`` starts at the main directions of what its layer is given (arXiv 2410.07170), by peft."""

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
"""Rows after which directions that still turn are given up."""


class StepSource(Protocol):
    """The steps of a run, by epoch and number."""

    def __len__(self) -> int:
        """Return the number of steps of an epoch."""

    def step(self, epoch: int, index: int, rank: int = 0, world_size: int = 1) -> StepBatch:
        """Return a step."""


@dataclass(frozen=True)
class PackedRows:
    """The rows of the first epoch in its order, whole, whoever shares them out later.

    Only those are of use that train at least as many tokens as the adapters have ranks.
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
    """Return the main directions of what each target layer is given, as peft finds them.

    It looks at trained tokens only, and goes on through the rows until the directions no longer turn. Each layer keeps
    the rank that the recipe says: ranks that follow the data would be another model on every topology.

    Args:
        model: The model as it was read, without adapters, on the device that computes.
        capabilities: What is known about it.
        config: The adapters that it is to have.
        steps: The run's own.

    Returns:
        For each layer an orthonormal matrix of shape ``(rank, inputs)``.

    Raises:
        ConfigError: There are other layers than linear ones, too few tokens in every row, or no end.
    """
    layers = [
        name for name in config.target_modules or () if isinstance(model.get_submodule(name), (nn.Linear, Conv1D))
    ]
    if others := sorted({*(config.target_modules or ()), *(config.target_parameters or ())} - {*layers}):
        message = f"init eva is for linear layers, not for {others[0]}"
        raise ConfigError(message, where=INIT_OPTION, remedy="take another init, or leave it out of targets")
    rows = PackedRows(steps, capabilities, config.r)
    if next(iter(rows), None) is None:
        message = f"no row has {config.r} trained tokens, from which init eva takes rank {config.r}"
        raise ConfigError(message, where=INIT_OPTION, remedy="take longer rows, a smaller r or another init")
    asked = 0

    def forward(model: PreTrainedModel, row: PackedSequence) -> None:
        nonlocal asked
        asked += 1
        if asked > FORWARDS:
            message = f"the directions of init eva still turn after {FORWARDS} rows"
            raise ConfigError(message, where=INIT_OPTION, remedy="take another init")
        model(**inputs_of(model, row, capabilities.isolates_documents))

    plain = LoraConfig(
        r=config.r,
        target_modules=config.target_modules,
        init_lora_weights=EVA,  # type: ignore[arg-type]  # one of the words it knows
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
        raise ConfigError(f"peft finds no directions in this data ({reason})", where=INIT_OPTION) from error
    return cast("dict[str, Tensor]", found)


@torch.no_grad()
def set_directions(model: PreTrainedModel, found: dict[str, Tensor]) -> None:
    """Give the ``A`` of each layer its directions; every ``B`` stays zero."""
    for name, layer in layers_of(model):
        cast("Tensor", layer.lora_A[ADAPTER_NAME].weight).copy_(found[name])
