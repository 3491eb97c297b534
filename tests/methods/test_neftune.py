from __future__ import annotations

import torch

from lightning_hub.methods.neftune import Neftune
from lightning_hub.ops.attention import PACKED
from lightning_hub.ops.batch import PackedSequence
from lightning_hub.ops.loss import inputs_of
from tests.ops.models import documents, make


def _embeddings(alpha: float, training: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters the first layer, and the embeddings without noise."""
    model = make("llama", PACKED).train(training)
    Neftune(alpha).attach(model)
    seen: list[torch.Tensor] = []
    layer = model.get_submodule("model.layers.0")
    layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    row = PackedSequence.pack(documents(4, 16))
    torch.manual_seed(1)
    model(**inputs_of(model, row))
    return seen[0][0], model.get_input_embeddings()(row.input_ids)[0]


def test_noise_is_as_strong_as_the_document_is_short() -> None:
    noisy, clean = _embeddings(5.0, training=True)
    noise = (noisy - clean).abs()
    for part, length in ((noise[:4], 4), (noise[4:], 16)):
        reach = 5.0 / (length * clean.shape[1]) ** 0.5
        assert part.max() <= reach * 1.0001
        assert part.max() > 0.9 * reach


def test_no_noise_while_validating() -> None:
    noisy, clean = _embeddings(5.0, training=False)
    assert torch.equal(noisy, clean)
