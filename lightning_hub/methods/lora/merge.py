"""Merging: an adapter folder and its base become a plain model, and what the cast loses is said."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from lightning_hub.checkpoints.export import write_export
from lightning_hub.errors import HubError
from lightning_hub.methods.lora.adapters import layers_of
from lightning_hub.methods.lora.folder import check_answers, probe
from lightning_hub.models.pretrained import Pretrained

LARGE = 0.1
"""Share of a change that a cast may lose without a word about it."""


@dataclass
class Survival:
    """What becomes of a change when the weights that carry it are cast.

    Attributes:
        changed: How many numbers the adapter has changed.
        kept: How many of them differ from the base's after the cast.
        change: Sum of the squares of the change.
        lost: Sum of the squares of what the cast has done to it.
    """

    changed: int = 0
    kept: int = 0
    change: float = 0.0
    lost: float = 0.0

    def add(self, before: Tensor, after: Tensor, dtype: torch.dtype) -> None:
        """Count one weight, before and after the merge."""
        cast = after.to(dtype)
        self.changed += int((after != before).sum())
        self.kept += int(((after != before) & (cast != before.to(dtype))).sum())
        self.change += float((after - before).square().sum())
        self.lost += float((cast.float() - after).square().sum())

    def describe(self, dtype: torch.dtype) -> str:
        """Return a line for a person."""
        share = self.kept / max(1, self.changed)
        error = (self.lost / self.change) ** 0.5 if self.change else 0.0
        name = str(dtype).removeprefix("torch.")
        hint = "; --dtype float32 keeps it" if error > LARGE else ""
        return (
            f"in {name} {share:.1%} of the changed numbers differ from the base's, and the change is off by "
            f"{error:.1%}{hint}"
        )


def _weight(layer: LoraLayer) -> Tensor:
    """Return the weight that a layer adapts."""
    if isinstance(layer, ParamWrapper):
        held: Tensor = layer.get_param()  # type: ignore[no-untyped-call]
        return held.detach()
    return cast("Tensor", layer.get_base_layer().weight).detach()


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast weights only: buffers, as those of rotary positions, need their digits."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def write_merged(
    target: Path, folder: Path, base: Pretrained, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> str:
    """Merge an adapter into its base in float32, cast, write a plain model folder, and check it by reading it again.

    Args:
        target: The folder to write.
        folder: The adapter's.
        base: The model that it was trained on.
        tokenizer: The tokenizer that made the training data, with its chat template.
        dtype: Of the weights as they are written.

    Returns:
        What of the change has survived the cast to bfloat16, and to ``dtype``.

    Raises:
        HubError: The folder does not answer as base and adapter together.
    """
    loaded = base.load(dtype=torch.float32, attn_implementation="eager")
    names = set(loaded.state_dict())
    adapted = PeftModel.from_pretrained(loaded, str(folder))
    expected = probe(adapted)
    survivals = {found: Survival() for found in dict.fromkeys((torch.bfloat16, dtype))}
    for _, layer in layers_of(adapted):
        before = _weight(layer).clone()
        layer.merge(safe_merge=True)
        for found, survival in survivals.items():
            survival.add(before, _weight(layer), found)
    merged = adapted.unload()
    check_answers(probe(merged), expected, folder)
    _cast(merged, dtype)
    weights = merged.state_dict()
    if weights.keys() != names:
        raise HubError(f"merging has changed names: {min(weights.keys() ^ names)}", where=str(folder))
    write_export(target, merged, weights, tokenizer)
    _cast(merged, torch.float32)
    again = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, attn_implementation="eager")
    check_answers(probe(again), probe(merged), target)
    return "\n".join(f"merge  {survival.describe(found)}" for found, survival in survivals.items())
