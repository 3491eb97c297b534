"""The proofs that need one process, and the reference training for the proof with two ranks.

usage: python -m lightning_hub.doctor.single_rank FOLDER CHECK...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_hub.checkpoints.export import write_export
from lightning_hub.doctor.findings import DISTRUST, Finding, equality, write_findings
from lightning_hub.doctor.recorded_run import (
    ProofFiles,
    accelerator,
    distance,
    max_distance,
    train_recorded,
    worst_distance,
)
from lightning_hub.models.pretrained import Pretrained
from lightning_hub.ops.attention import PACKED
from lightning_hub.ops.attention_proof import proven_loss
from lightning_hub.ops.batch import IGNORE_INDEX, PackedSequence
from lightning_hub.ops.loss import inputs_of
from lightning_hub.parent import die_with_parent

LOGITS, GRADIENTS = 1e-5, 1e-6
"""Bounds of relative errors in float32."""


def main(folder: Path, wanted: list[str]) -> None:
    """Write the model and run the requested proofs."""
    die_with_parent()
    material = ProofFiles(folder)
    material.make_model()
    proofs = {"packed": packed, "accumulated": accumulated, "exported": exported}
    findings = [finding for name, proof in proofs.items() if name in wanted for finding in proof(material)]
    if "ranks" in wanted:
        torch.save(vars(train_recorded(material, accelerator())[0].seen), material.reference)
    write_findings(findings, folder / "one_process.json")


def packed(material: ProofFiles) -> list[Finding]:
    """Compare a packed row with its documents, one forward each, in the unchanged model of transformers."""
    data = material.data()
    data.open(Pretrained(str(material.model)))
    row = max(data.plan.step(0, 0).rows, key=lambda row: len(row.lengths))
    assert len(row.lengths) > 1, "the row is packed"
    model = Pretrained(str(material.model)).load(dtype=torch.float32, attn_implementation=PACKED).eval()
    head = proven_loss(model)
    head(row).backward()
    with torch.no_grad():
        together = model(**inputs_of(model, row)).logits[0]
    plain = _plain(material.model)
    alone = [plain(document.input_ids, use_cache=False).logits[0] for document in row.documents()]
    losses = [_loss(logits, document) for logits, document in zip(alone, row.documents(), strict=True)]
    torch.stack(losses).sum().backward()
    of = f"{len(alone)} documents in a row, alone in transformers"
    how = head.capabilities.reason or f"{head.capabilities.attention}, {len(alone)} documents in a forward"
    packs = head.capabilities.isolates_documents
    return [
        Finding("packed = unpacked: one forward", packs, how, None if packs else DISTRUST),
        equality("packed = unpacked: logits", distance([together], [torch.cat(alone)]), LOGITS, of),
        equality("packed = unpacked: gradients", distance(_gradients(model), _gradients(plain)), GRADIENTS, of),
    ]


def accumulated(material: ProofFiles) -> list[Finding]:
    """Compare the training step over several packed rows with one padded batch in the unchanged transformers model."""
    module, data = train_recorded(material, "cpu", learning_rate=0.0)
    rows = [len(data.plan.rows(0, index)) for index in range(len(data.plan))]
    assert max(rows) > 1, "steps have several rows"
    losses, errors = [], []
    for index, found in enumerate(module.seen.gradients):
        plain = _plain(material.model)
        losses.append(_padded_loss(plain, data.plan.step(0, index).rows))
        expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
        both = [(grad, expected[name.removeprefix("model.")]) for name, grad in found.items()]
        errors.append(distance([ours for ours, _ in both], [theirs for _, theirs in both if theirs is not None]))
    of = f"{len(rows)} steps of up to {max(rows)} rows, as padded batches in transformers"
    return [
        equality("accumulated = one batch: loss", worst_distance(module.seen.losses, losses), GRADIENTS, of),
        equality("accumulated = one batch: gradients", max_distance(errors), GRADIENTS, of),
    ]


def exported(material: ProofFiles) -> list[Finding]:
    """Compare the trained module with its exported folder."""
    module, data = train_recorded(material, "cpu")
    model, weights = module.export_state()
    folder = material.folder / "export"
    write_export(folder, model, weights, data.tokenizer)
    model.eval()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    document = next(data.plan.step(0, 0).rows[0].documents())
    with torch.no_grad():
        ours = model(**inputs_of(model, document)).logits
        theirs = plain(document.input_ids, use_cache=False).logits
    of = "logits of the folder in transformers, after a training"
    return [equality("exported = trained", distance([theirs], [ours]), LOGITS, of)]


def _plain(folder: Path) -> PreTrainedModel:
    """Return the unchanged model of transformers."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    return model


def _loss(logits: Tensor, document: PackedSequence) -> Tensor:
    """Return the summed cross-entropy of one document; ``logits`` has shape ``(tokens, vocabulary)``."""
    return F.cross_entropy(logits[:-1], document.labels[0, 1:], ignore_index=IGNORE_INDEX, reduction="sum")


def _padded_loss(plain: PreTrainedModel, rows: tuple[PackedSequence, ...]) -> float:
    """Run all documents as one padded batch, compute the gradients, and return the mean loss of the trained tokens."""
    documents = [document for row in rows for document in row.documents()]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([document.input_ids[0] for document in documents], batch_first=True)
    labels = pad([document.labels[0] for document in documents], batch_first=True, padding_value=IGNORE_INDEX)
    mask = pad([torch.ones_like(document.input_ids[0]) for document in documents], batch_first=True)
    logits = plain(ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
    loss.backward()
    return float(loss.detach())


def _gradients(model: PreTrainedModel) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
