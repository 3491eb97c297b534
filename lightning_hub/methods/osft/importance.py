"""Adaptive ranks: a layer whose output is similar to its input protects more of its directions.

The importance of a layer is the cosine similarity of its input and output, averaged over the tokens of sample data and
divided by the mean over all layers. A layer with importance ``I`` protects the share ``m + I (t - m)`` of its
directions: ``t`` on average, and ``m`` with a similarity of 0 (arXiv 2504.07097, section on adaptive ranks).
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
"""``m``: the smallest share of its directions that a layer protects."""

SAMPLE_TOKENS = 4096
"""How many tokens are used, in complete packed rows, at least one."""


@torch.no_grad()
def similarities(model: PreTrainedModel, rows: Iterable[PackedSequence]) -> list[float]:
    """Return for each decoder block the mean cosine similarity of its input and output, over tokens of sample data.

    Args:
        model: The model with its weights, on one device.
        rows: Packed rows of the data; the first ones are used, until there are ``SAMPLE_TOKENS`` tokens.

    Returns:
        One number from -1 to 1 for each block, in order; each is a mean over tokens, computed in float64.
    """
    blocks = decoder_blocks(model)
    sums, counts = [0.0] * len(blocks), [0] * len(blocks)

    def watch(index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs = args[0] if args else kwargs["hidden_states"]
        outputs = output[0] if isinstance(output, tuple) else output
        similarity = nn.functional.cosine_similarity(inputs.double(), outputs.double(), dim=-1)  # one for each token
        sums[index] += float(similarity.sum())
        counts[index] += similarity.numel()

    def hook(index: int) -> Any:
        return lambda block, args, kwargs, output: watch(index, args, kwargs, output)

    was_training, head = model.training, proven_loss(model.eval())
    hooks = [block.register_forward_hook(hook(index), with_kwargs=True) for index, block in enumerate(blocks)]
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
    """Return for each layer the share of its directions that may be trained, 0 to 1.

    Args:
        similarities: Similarity of the input and output of each layer.
        mean_ratio: The mean of the shares, after they are clamped to the bounds.
        bounds: The smallest and the largest share of a layer.

    Raises:
        ConfigError: No shares within the bounds have that mean.
    """
    least, most = bounds
    if not 0.0 <= least <= mean_ratio <= most <= 1.0:
        raise ConfigError(
            f"rank_bounds {least} to {most} do not contain unfreeze_rank_ratio {mean_ratio}, or are not within 0 to 1",
            where="model.init_args.rank_bounds",
            remedy="set rank_bounds to a smaller and a larger number than unfreeze_rank_ratio",
        )
    total = sum(similarities)
    importance = [len(similarities) * one / total if total else 1.0 for one in similarities]
    protected = min(LEAST_PROTECTED, 1.0 - mean_ratio)
    wanted = torch.tensor([1.0 - protected - one * (1.0 - mean_ratio - protected) for one in importance]).double()
    low, high = -2.0 - float(wanted.abs().max()), 2.0 + float(wanted.abs().max())
    for _ in range(100):  # bisection: the mean grows with the shift
        shift = (low + high) / 2
        low, high = (shift, high) if float(_clamp(wanted, shift, bounds).mean()) < mean_ratio else (low, shift)
    return [round(one, 4) for one in _clamp(wanted, (low + high) / 2, bounds).tolist()]


def _clamp(shares: Tensor, shift: float, bounds: tuple[float, float]) -> Tensor:
    return (shares + shift).clamp(*bounds)
