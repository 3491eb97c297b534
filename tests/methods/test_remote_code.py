"""Models with code of their own are proven as all others are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_hub.models.pretrained import Pretrained
from lightning_hub.ops.attention import PACKED
from lightning_hub.ops.attention_proof import apply_capabilities, prove_attention
from lightning_hub.ops.batch import PackedSequence
from lightning_hub.ops.loss import CausalLMLoss
from tests.ops.models import documents, make

CODE = """
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, input_ids, **kwargs):
        embedded = self.get_input_embeddings()(input_ids)
        shifted = nn.functional.pad(embedded, (0, 0, 1, 0))[:, :-1]
        return super().forward(inputs_embeds=embedded + SHARE * shifted, **kwargs)
"""


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_a_class_of_its_own_is_proven(share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_HUB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / f"own{int(10 * share)}"
    plain = make("llama", "eager")
    plain.config.auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    plain.save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "own"'))
    (folder / "own.py").write_text(CODE.replace("SHARE", str(share)))
    pretrained = Pretrained(str(folder), trust_remote_code=True)
    with torch.device("meta"):
        outline = pretrained.skeleton(dtype=torch.float32, attn_implementation="eager")
    assert type(outline).__name__ == "OwnForCausalLM"
    proven = prove_attention(type(outline), outline.config, PACKED)
    assert proven.isolates_documents is (share == 0)
    model = pretrained.load(dtype=torch.float32, attn_implementation=proven.attention)
    row = PackedSequence.pack(documents(7, 12, 5))
    eager = pretrained.load(dtype=torch.float32, attn_implementation="eager")
    expected = torch.zeros(())
    for document in row.documents():
        logits = eager(input_ids=document.input_ids).logits[0, :-1]
        expected = expected + torch.nn.functional.cross_entropy(logits, document.labels[0, 1:], reduction="sum")
    found = CausalLMLoss(model, capabilities=apply_capabilities(model, proven))(row)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
