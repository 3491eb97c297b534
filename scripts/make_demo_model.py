#!/usr/bin/env python3
"""Make the embedded model: a small Llama that spells and reverses words, trained by this project itself.

With --room it makes the second one instead, on which ``lightning-hub demo --method`` shows what methods keep; see
``benchmarks/demo_room.py``.

usage: python scripts/make_demo_model.py [--room] [--to FOLDER] [--steps N]

Everything comes from seeds; nothing is downloaded. It takes about three minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from lightning_hub.cli import run
from lightning_hub.demo.tasks import PRETRAINING, conversations
from lightning_hub.models.pretrained import EMBEDDED_FOLDER, ROOM_FOLDER

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is all that Python adds
from benchmarks import demo_room

SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes: every text has ids, and letters stay apart."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(SPECIAL + alphabet)}, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=bytes_, eos_token="<|end|>", pad_token="<|pad|>", additional_special_tokens=SPECIAL[2:]
    )
    made.chat_template = TEMPLATE
    return made


def random_model(folder: Path) -> None:
    """Write a model with random weights, its tokenizer beside it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def main() -> int:
    """Make random weights, train them on the pretraining tasks, and keep the export in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--room", action="store_true", help="make the second embedded model")
    parser.add_argument("--to", type=Path, help="where it goes (else into the package)")
    parser.add_argument("--steps", type=int, help="2000, and 450 with --room")
    given = parser.parse_args()
    if given.room:
        torch.set_num_threads(1)
        to = given.to or ROOM_FOLDER
        shutil.rmtree(to, ignore_errors=True)
        demo_room.make(to, seed=0, steps=given.steps or demo_room.STEPS)
        return 0
    given.to, given.steps = given.to or EMBEDDED_FOLDER, given.steps or 2000
    with tempfile.TemporaryDirectory() as scratch:
        base, rows, made = Path(scratch, "base"), Path(scratch, "rows.jsonl"), Path(scratch, "run")
        random_model(base)
        rows.write_text(
            "".join(json.dumps(row) + "\n" for row in conversations(PRETRAINING, 24_000, seed=1, capitals=0.3))
        )
        # fmt: off
        failed = run([
            "fit", "--run-dir", str(made),
            "--trainer.max_steps", str(given.steps), "--trainer.max_epochs=-1", "--trainer.gradient_clip_val", "1.0",
            "--model", "SFT", "--model.model", str(base), "--model.learning_rate", "3e-3",
            "--model.betas", "[0.9, 0.98]", "--model.label_smoothing", "0.05",
            "--model.weight_decay", "0.01", "--model.warmup_steps", "50",
            "--data", "ChatData", "--data.train", str(rows), "--data.max_seq_len", "256",
            "--data.effective_batch_size", "64", "--data.max_tokens_per_gpu", "2048",
        ])
        # fmt: on
        if failed:
            return failed
        model = AutoModelForCausalLM.from_pretrained(made / "export", dtype=torch.bfloat16)
        shutil.rmtree(given.to, ignore_errors=True)
        model.save_pretrained(given.to)
        tokenizer().save_pretrained(given.to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
