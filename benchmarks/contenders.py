"""One contender in a process of its own: ``python -m benchmarks.contenders NAME --work DIR --steps N --out FILE``.

The work folder holds ``model`` and ``rows.jsonl``. ``ours`` is the command line itself. ``raw`` is a bare loop over
the same rows, from the same loader, with the same attention, loss head, optimizer and clipping. ``raw-full-logits``
differs from ``raw`` in its head: it makes the logits of every token and hands them to PyTorch's cross-entropy.
``lora`` and ``lora-raw`` are the first two with adapters.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from transformers import PreTrainedModel

from benchmarks.clock import Clock
from lightning_hub.cli import run
from lightning_hub.data.datamodule import ChatData
from lightning_hub.data.step_plan import StepLoader
from lightning_hub.models.pretrained import Pretrained
from lightning_hub.ops.attention import PACKED, cu_seqlens_of
from lightning_hub.ops.attention_proof import proven_loss
from lightning_hub.ops.batch import PackedSequence, StepBatch

RANK, ALPHA = 16, 32
LEARNING_RATE, WEIGHT_DECAY, BETAS, CLIP = 1e-4, 0.01, (0.9, 0.95), 1.0

RowLoss = Callable[[PackedSequence], Tensor]


def ours(work: Path, steps: int, tokens: int, out: Path) -> None:
    """Train with ``lightning-hub fit``: run folder, metrics of every step, progress, checkpoint and export."""
    _fit(work, steps, tokens, out, "SFT")


def lora(work: Path, steps: int, tokens: int, out: Path) -> None:
    """Train adapters with ``lightning-hub fit``."""
    _fit(work, steps, tokens, out, "LoRA", "--model.r", str(RANK), "--model.alpha", str(ALPHA))


def _fit(work: Path, steps: int, tokens: int, out: Path, method: str, *flags: str) -> None:
    clock = [{"class_path": "benchmarks.clock.Clock", "init_args": {"path": str(out)}}]
    # fmt: off
    code = run([
        "fit", "--run-dir", str(out.with_suffix("")), "--allow-class", "benchmarks",
        "--trainer.accelerator", "cpu", "--trainer.max_steps", str(steps), "--trainer.log_every_n_steps", "1",
        "--trainer.gradient_clip_val", str(CLIP), "--trainer.callbacks", json.dumps(clock),
        "--model", method, *flags, "--model.model", str(work / "model"), "--model.learning_rate", str(LEARNING_RATE),
        "--model.weight_decay", str(WEIGHT_DECAY), "--model.betas", json.dumps(BETAS),
        "--model.lr_scheduler", "constant",
        "--data", "ChatData", "--data.train", str(work / "rows.jsonl"),
        "--data.max_seq_len", str(tokens), "--data.tokens_per_step", str(tokens),
    ])
    # fmt: on
    if code:
        sys.exit(code)


def raw(work: Path, steps: int, tokens: int, out: Path) -> None:
    """Train with a bare loop and the same kernels."""
    model = _load(work)
    _loop(model, proven_loss(model), _steps(work, steps, tokens), out)


def lora_raw(work: Path, steps: int, tokens: int, out: Path) -> None:
    """Train adapters of peft with a bare loop and the same kernels."""
    model = _load(work)
    torch.manual_seed(42)  # as the command line seeds itself
    get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"))
    _loop(model, proven_loss(model), _steps(work, steps, tokens), out)


def raw_full_logits(work: Path, steps: int, tokens: int, out: Path) -> None:
    """Train with a bare loop that makes the logits of every token."""
    model = _load(work)

    def loss(row: PackedSequence) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": row.input_ids, "position_ids": row.position_ids, "use_cache": False}
        logits = model(**inputs, **cu_seqlens_of(row)).logits[0, :-1].float()
        return F.cross_entropy(logits, row.labels[0, 1:], reduction="sum")

    _loop(model, loss, _steps(work, steps, tokens), out)


def _load(work: Path) -> PreTrainedModel:
    torch.set_float32_matmul_precision("high")  # as the session sets it
    model = Pretrained(str(work / "model")).load(dtype=torch.float32, attn_implementation=PACKED)
    model.train()
    return model


def _steps(work: Path, steps: int, tokens: int) -> Iterator[StepBatch]:
    data = ChatData(train=str(work / "rows.jsonl"), max_seq_len=tokens, tokens_per_step=tokens)
    data.open(Pretrained(str(work / "model")))
    return islice(StepLoader(data.plan, lambda: (0, 0), rank=0, world_size=1), steps)


def _loop(model: PreTrainedModel, loss_of: RowLoss, steps: Iterable[StepBatch], out: Path) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=1e-8, fused=True)
    clock = Clock(str(out))
    for step in steps:
        optimizer.zero_grad()
        total = 0.0
        for row in step.rows:
            loss = loss_of(row) / step.num_trained
            cast("Callable[[], None]", loss.backward)()
            total += loss.item()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        clock.mark(total)
    clock.write()


CONTENDERS = {"ours": ours, "raw": raw, "raw-full-logits": raw_full_logits, "lora": lora, "lora-raw": lora_raw}


def main() -> None:
    """Run one contender."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True, help="tokens of a row; a step is one row")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    CONTENDERS[given.name](given.work, given.steps, given.tokens, given.out)


if __name__ == "__main__":
    main()
