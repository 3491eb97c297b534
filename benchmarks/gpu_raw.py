"""A bare loop on one device: what ``benchmarks.gpu`` compares ``fit`` with, in a process of its own.

The rows come from the same loader, attention and loss head are the same; what is left out is the trainer: no run
folder, no metrics, no checks, no checkpoint, no export.

usage: python -m benchmarks.gpu_raw --kind sft | lora | nf4 --work DIR --steps N --tokens N --longest N --out FILE
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import AdamW
from transformers import BitsAndBytesConfig, PreTrainedModel

from benchmarks.contenders import ALPHA, BETAS, CLIP, RANK
from lightning_hub.data.datamodule import ChatData
from lightning_hub.data.step_plan import StepLoader
from lightning_hub.models.pretrained import Pretrained
from lightning_hub.ops.attention import PACKED
from lightning_hub.ops.attention_proof import proven_loss


def read(folder: Path, kind: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Read the model and put adapters into it as a stock loop does: in the dtype of the base."""
    options: dict[str, Any] = {}
    if kind == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        options["device"] = device
    model = Pretrained(str(folder)).load(dtype=dtype, attn_implementation=PACKED, **options)
    nn.Module.to(model, device)
    if kind != "sft":
        torch.manual_seed(42)  # as the command line seeds itself
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        get_peft_model(model, config, autocast_adapter_dtype=False)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    model.train()
    return model


def train(given: argparse.Namespace) -> dict[str, Any]:
    """Run the loop and return what was measured."""
    device = torch.device(given.device)
    torch.set_float32_matmul_precision("high")  # as the trainer sets it
    mixed = given.precision == "bf16-mixed"
    model = read(given.work / "model", given.kind, torch.float32 if mixed else torch.bfloat16, device)
    loss_of = proven_loss(model)
    data = ChatData(
        train=str(given.work / "rows.jsonl"),
        max_seq_len=given.longest,
        max_tokens_per_gpu=given.tokens,
        tokens_per_step=given.tokens,
    )
    data.open(Pretrained(str(given.work / "model")))
    steps = islice(StepLoader(data.plan, lambda: (0, 0), rank=0, world_size=1), given.steps)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(parameters, lr=1e-5, betas=BETAS, eps=1e-8, weight_decay=0.0, fused=True)
    losses, ends, tokens = [], [], []
    for number, step in enumerate(steps):
        if number == 1 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        optimizer.zero_grad()
        total = 0.0
        for row in step.rows:
            moved = row.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                loss = loss_of(moved) / step.num_trained
            cast("Callable[[], None]", loss.backward)()
            total += loss.item()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        losses.append(total)
        ends.append(time.time())
        tokens.append(step.num_tokens)
    return {
        "losses": losses,
        "step_seconds": [after - before for before, after in pairwise(ends)],
        "tokens": tokens,
        "first_step_seconds": ends[0] - psutil.Process().create_time(),
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
    }


def main() -> None:
    """Run it and write the notes as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("sft", "lora", "nf4"), required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--longest", type=int, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", choices=("bf16-true", "bf16-mixed"), default="bf16-true")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.write_text(json.dumps(train(given)), encoding="utf-8")


if __name__ == "__main__":
    main()
