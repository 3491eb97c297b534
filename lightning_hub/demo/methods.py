"""The data of ``lightning-hub demo --method`` for the second embedded model, and the tests of that model."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_hub.demo.tasks import METHODS, ChatExample, numbers, turned_words

METHODS_RECIPE = Path(__file__).with_name("room.yaml")
FACTS, SHOWN, TESTED = 30, 2000, 100
"""Number of facts to learn, of examples to train on (each fact many times), and of words to test the old task."""

WORDS_SEED = 999
"""Seed of the words that test the old task."""


def method_flags(method: str, train: Path, val: Path, model: str) -> list[str]:
    """Return the arguments of ``fit`` for a method."""
    flags = ["--config", str(METHODS_RECIPE)]
    if method != METHODS[0]:
        flags += ["--config", str(METHODS_RECIPE.with_name(f"{method}.yaml"))]
    return [*flags, "--model.model", model, "--data.train", str(train), "--data.val", str(val)]


def write_rows(folder: Path, train: list[ChatExample], val: list[ChatExample]) -> tuple[Path, Path]:
    """Write the training and validation examples, readable only by the owner; return the two files."""
    paths = folder / "train.jsonl", folder / "val.jsonl"
    for path, rows in zip(paths, (train, val), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        path.chmod(0o600)
    return paths


def facts(seed: int) -> list[ChatExample]:
    """Return the facts of a seed."""
    return numbers(FACTS, seed)


def write_facts(folder: Path, seed: int) -> tuple[Path, Path]:
    """Write the facts of a seed many times to train on, and once to validate on. Validation asks the trained facts."""
    rows = facts(seed)
    return write_rows(folder, [rows[index % FACTS] for index in range(SHOWN)], rows)


def known_and_new(model: str, seed: int) -> tuple[float, float]:
    """Return the share of right answers for words to reverse, and for the facts of a seed.

    Args:
        model: Folder of a model.
        seed: The seed of the facts.
    """
    return share(model, turned_words(TESTED, WORDS_SEED)), share(model, facts(seed))


def share(model: str, rows: list[ChatExample]) -> float:
    """Return the share of the conversations whose answer the model gives exactly."""
    found = answers(model, [row["messages"][0]["content"] for row in rows])
    return sum(answer == row["messages"][1]["content"] for answer, row in zip(found, rows, strict=True)) / len(rows)


def answers(model: str, prompts: list[str]) -> list[str]:
    """Return the answers of a model, with the most likely token each time."""
    import torch  # 4 s with transformers, but every caller has imported them already

    from lightning_hub.models.generation import complete
    from lightning_hub.models.pretrained import Pretrained

    pretrained = Pretrained(model)
    loaded = pretrained.load(dtype=torch.float32, attn_implementation="sdpa").eval()
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return complete(loaded, pretrained.tokenizer, turns, max_new_tokens=24)
