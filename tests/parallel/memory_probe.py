"""Weighs processes while they work: what they hold beyond where they began, pages mapped from files left out."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from transformers import LlamaConfig, LlamaForCausalLM

Samples = list[tuple[float, int]]
"""Times and bytes."""


@contextmanager
def weighed(samples: Samples) -> Iterator[None]:
    """Note what this process holds while the block lasts."""
    done = Event()
    scale = Thread(target=_weigh, args=(samples, done))
    scale.start()
    try:
        yield
    finally:
        done.set()
        scale.join()


def _weigh(samples: Samples, done: Event) -> None:
    """Pages mapped from files are the system's to drop; anonymous ones count."""
    before = 0
    while not done.wait(0.002):
        held = 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])
        before = before or held
        samples.append((time.monotonic(), held - before))


def heaviest_moment(ranks: list[Samples]) -> int:
    """Return the most that all processes held at one time."""
    moments = sorted(moment for samples in ranks for moment, _ in samples)
    places = [[bisect_right(samples, (moment, 1 << 62)) for moment in moments] for samples in ranks]
    held = [
        [samples[place - 1][1] if place else 0 for place in row] for samples, row in zip(ranks, places, strict=True)
    ]
    return max(map(sum, zip(*held, strict=True)))


def save_heavy_model(folder: Path, layers: int) -> int:
    """Save a model and return its bytes as float32, 124 MB for each layer.

    Its weights have 36 MB each, as large models have them: freed blocks of a few MB linger in the heap.
    """
    config = LlamaConfig(
        vocab_size=264, hidden_size=1024, intermediate_size=8704, num_hidden_layers=layers, tie_word_embeddings=True
    )
    model = LlamaForCausalLM(config)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.bfloat16().save_pretrained(folder)  # read as float32: a copy of its own in memory
    return size
