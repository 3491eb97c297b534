"""NEFTune: uniform noise on the input embeddings while training (Jain et al. 2023, arXiv 2310.05914, section 2)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Neftune:
    """Adds uniform noise in ``+-alpha / sqrt(length * size)`` to the embeddings of each document.

    ``length`` is the number of tokens of the document, not of the packed row: packing must not change the noise.
    ``size`` is the hidden size.

    Args:
        alpha: Strength of the noise; the paper uses 5 to 15.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def attach(self, model: PreTrainedModel) -> None:
        """Add the noise to every training forward of ``model``."""
        model.base_model.register_forward_pre_hook(self._embed_with_noise, with_kwargs=True)

    def _embed_with_noise(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, Tensor]
    ) -> tuple[tuple[object, ...], dict[str, Tensor]] | None:
        if not module.training:
            return None
        embed = cast("PreTrainedModel", module).get_input_embeddings()
        embeddings: Tensor = embed(kwargs.pop("input_ids"))
        document = (kwargs["position_ids"][0] == 0).cumsum(0) - 1
        lengths = torch.bincount(document)[document]
        reach = self.alpha / (lengths * embeddings.shape[2]).sqrt()
        noise = torch.empty_like(embeddings).uniform_(-1, 1) * reach[:, None].to(embeddings.dtype)
        return args, {**kwargs, "inputs_embeds": embeddings + noise}
