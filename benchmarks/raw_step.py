"""The first step without a trainer: ``python benchmarks/raw_step.py MODEL ROWS OUT``, compared with ``fit``.

Reads the same chats, renders and tokenises them, and makes one optimizer step on one row with a stock model.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENS = 2048


def main(folder: str, rows: str, out: str) -> None:
    """Make one step and note when it ended."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    chats = [json.loads(line)["messages"] for line in Path(rows).read_text(encoding="utf-8").splitlines()]
    texts = tokenizer.apply_chat_template(chats, tokenize=False)
    documents = tokenizer(texts, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[token for document in documents for token in document][:TOKENS]])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    notes = {"losses": [loss.item()], "wall": [time.time()], "cpu": [time.process_time()], "peak_mib": 0}
    Path(out).write_text(json.dumps(notes), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
