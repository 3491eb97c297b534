"""Ranks by the importance of a layer: layers that pass their input on nearly as it is keep more of their directions.

The importance of a layer is the cosine similarity of its input and output, averaged over the tokens of sample data and
divided by the mean over all layers. A layer with importance ``I`` protects the share ``m + I (t - m)`` of its
directions, ``t`` on average and ``m`` where nothing is similar (arXiv 2504.07097, section on adaptive ranks).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_hub.errors import ConfigError
from lightning_hub.ops.attention_proof import proven_loss
from lightning_hub.ops.batch import PackedSequence
from lightning_hub.parallel.fsdp import decoder_blocks

LEAST_PROTECTED = 0.1
"""``m``: the share of its directions that even a layer without any importance protects."""

SAMPLE_TOKENS = 4096
"""How many tokens are looked at; whole rows, at least one."""


@torch.no_grad()
def similarities(model: PreTrainedModel, rows: Iterable[PackedSequence]) -> list[float]:
    """Return for each decoder block the mean cosine similarity of its input and output over the tokens of rows.

    Args:
        model: With its weights, on one device.
        rows: Sample data, from the beginning, until enough tokens are seen.
    """
    blocks = decoder_blocks(model)
    sums, counts = [0.0] * len(blocks), [0] * len(blocks)

    def watch(place: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        made = output[0] if isinstance(output, tuple) else output
        alike = nn.functional.cosine_similarity(given.double(), made.double(), dim=-1)
        sums[place] += float(alike.sum())
        counts[place] += alike.numel()

    def hook(place: int) -> Any:
        return lambda block, args, kwargs, output: watch(place, args, kwargs, output)

    was_training, head = model.training, proven_loss(model.eval())
    hooks = [block.register_forward_hook(hook(place), with_kwargs=True) for place, block in enumerate(blocks)]
    try:
        for row in rows:
            head(row)
            if counts[0] >= SAMPLE_TOKENS:
                break
    finally:
        for handle in hooks:
            handle.remove()
        model.train(was_training)
    return [total / max(1, count) for total, count in zip(sums, counts, strict=True)]


def layer_ratios(
    similarities: Sequence[float], mean_ratio: float, bounds: tuple[float, float] = (0.0, 1.0)
) -> list[float]:
    """Return for each layer which share of its directions may be trained.

    Args:
        similarities: How similar the input and output of each layer are.
        mean_ratio: What the shares are on average, whatever the bounds cut off.
        bounds: The least and the largest share of a layer.

    Raises:
        ConfigError: No shares within the bounds have that mean.
    """
    least, most = bounds
    if not 0.0 <= least <= mean_ratio <= most <= 1.0:
        raise ConfigError(
            f"rank_bounds {least} to {most} do not lie around unfreeze_rank_ratio {mean_ratio} within 0 to 1",
            where="model.init_args.rank_bounds",
            remedy="give a smaller and a larger number",
        )
    total = sum(similarities)
    importance = [len(similarities) * one / total if total else 1.0 for one in similarities]
    protected = min(LEAST_PROTECTED, 1.0 - mean_ratio)
    wanted = torch.tensor([1.0 - protected - one * (1.0 - mean_ratio - protected) for one in importance]).double()
    low, high = -2.0 - float(wanted.abs().max()), 2.0 + float(wanted.abs().max())
    for _ in range(100):  # bisection: the mean grows with the shift
        shift = (low + high) / 2
        low, high = (shift, high) if float(_cut(wanted, shift, bounds).mean()) < mean_ratio else (low, shift)
    return [round(one, 4) for one in _cut(wanted, (low + high) / 2, bounds).tolist()]


def _cut(shares: Tensor, shift: float, bounds: tuple[float, float]) -> Tensor:
    return (shares + shift).clamp(*bounds)
