"""Preparing data beside the tokenizer alone: CPU time, one thread, seeded synthetic chats.

Prints one line of JSON and appends it to the results. ``ratio`` is the rate of a whole preparation (read, render,
tokenise, mask, store) over that of the tokenizer's ``encode_batch`` on the same rendered texts (medians of alternated
rounds). With ``--rows 100000 --rounds 1`` it also tells what a second start costs on a large file.

usage: python -m benchmarks.data_preparation [--rows 4000] [--rounds 5] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.records import record
from lightning_hub.data.conversation import Conversation
from lightning_hub.data.encode import Encoder, to_sample
from lightning_hub.data.masking.chat_template import resolve_template
from lightning_hub.data.prepare import Prepared, prepare
from lightning_hub.data.readers.formats import normalise
from lightning_hub.data.settings import DataSettings
from lightning_hub.runs.files import Json

MEAN_WORDS = 195  # a little over one token a word gives about 220 tokens a chat


def make_words(rng: np.random.Generator, count: int) -> list[str]:
    """Invented words of one to four syllables, the frequent ones short."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in ("a", "e", "i", "o", "u", "an", "er", "is")]
    words = {"".join(rng.choice(syllables, size=int(rng.integers(1, 5)))) for _ in range(2 * count)}
    return sorted(words, key=lambda word: (len(word), word))[:count]


def make_chats(rng: np.random.Generator, words: list[str], rows: int) -> list[dict[str, object]]:
    """Chats of one to three rounds with log-normal lengths; one in three has a system text."""
    weights = 1 / np.arange(1, len(words) + 1)
    pool = rng.choice(np.array(words), size=400_000, p=weights / weights.sum())

    def text(length: int) -> str:
        start = int(rng.integers(0, len(pool) - length))
        return " ".join(pool[start : start + length]) + "."

    chats: list[dict[str, object]] = []
    for target in np.clip(rng.lognormal(np.log(MEAN_WORDS) - 0.3, 0.8, rows), 12, 1500).astype(int):
        rounds = int(rng.integers(1, 4)) if target > 100 else 1
        messages = [{"role": "system", "content": "Answer briefly."}] if rng.random() < 0.33 else []
        for _ in range(rounds):
            messages.append({"role": "user", "content": text(max(3, int(target) // (3 * rounds)))})
            messages.append({"role": "assistant", "content": text(max(3, 2 * int(target) // (3 * rounds)))})
        chats.append({"messages": messages})
    return chats


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 8,192 entries with ChatML's tokens and template."""
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    engine.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=engine, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = resolve_template("chatml", tokenizer)
    return tokenizer


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of this process for one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


COMPARED = 4000
"""Rows whose ids and labels are compared with the reference way, which takes its time."""


def equal_to_reference(prepared: Prepared, encoder: Encoder, chats: list[dict[str, object]]) -> bool:
    """Whether every id and label is the one that the reference way finds."""
    for index, chat in enumerate(chats):
        conversation = normalise(chat, "messages")
        assert isinstance(conversation, Conversation)
        expected = to_sample(encoder.reference_masker(conversation))
        ids, labels = prepared.train[index]
        if not (np.array_equal(ids, expected.ids) and np.array_equal(labels, expected.labels)):
            return False
    return True


def main() -> None:
    """Run the rounds and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    chats = make_chats(rng, make_words(rng, 20_000), options.rows)
    tokenizer = make_tokenizer([message["content"] for chat in chats for message in chat["messages"]])  # type: ignore[attr-defined]
    render = cast(Callable[..., list[str]], tokenizer.apply_chat_template)
    texts = render([chat["messages"] for chat in chats], tokenize=False)
    engine = tokenizer.backend_tokenizer
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "chats.jsonl"
        path.write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
        settings = DataSettings(train=str(path), max_seq_len=4096)
        alone, fast, whole, second = [], [], [], []
        for number in range(options.rounds):
            cache = Path(scratch) / f"cache-{number}"
            alone.append(cpu_seconds(lambda: engine.encode_batch(texts, add_special_tokens=False)))
            fast.append(cpu_seconds(lambda: engine.encode_batch_fast(texts, add_special_tokens=False)))
            whole.append(cpu_seconds(partial(prepare, settings, tokenizer, cache_dir=cache)))
            start = time.perf_counter()
            prepared = prepare(settings, tokenizer, cache_dir=cache)
            second.append(time.perf_counter() - start)
        equal = equal_to_reference(prepared, Encoder(settings, tokenizer), chats[:COMPARED])
    rates = {name: options.rows / statistics.median(times) for name, times in
             (("encode_batch", alone), ("encode_batch_fast", fast), ("prepare", whole))}  # fmt: skip
    result: dict[str, Json] = {
        "rows": options.rows,
        "tokens_per_row": round(prepared.report.tokens / options.rows, 1),
        "rows_per_cpu_second": {name: round(rate) for name, rate in rates.items()},
        "ratio": round(rates["prepare"] / rates["encode_batch"], 3),
        "ratio_to_encode_batch_fast": round(rates["prepare"] / rates["encode_batch_fast"], 3),
        "equal_to_reference": int(equal),
        "second_start_seconds": round(statistics.median(second), 4),
    }
    print(json.dumps(result))
    record("data_preparation", result)


if __name__ == "__main__":
    main()
