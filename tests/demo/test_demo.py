from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from lightning_hub.cli import run
from lightning_hub.demo.tasks import PRETRAINING, SHOUT, Task, conversations, words
from lightning_hub.models.generation import complete
from lightning_hub.models.pretrained import EMBEDDED_FOLDER, Pretrained
from lightning_hub.runs.folder import list_runs


def accuracy(model: str, task: Task, seed: int, count: int = 60) -> float:
    """The share of right answers to questions about words that were made for this test."""
    pretrained = Pretrained(model)
    loaded = pretrained.load(dtype=torch.float32, attn_implementation="sdpa")
    rows = conversations((task,), count, seed)
    answers = complete(loaded, pretrained.tokenizer, [row["messages"][:1] for row in rows], max_new_tokens=24)
    return sum(found == row["messages"][1]["content"] for found, row in zip(answers, rows, strict=True)) / count


@pytest.mark.parametrize("task", PRETRAINING, ids=lambda task: task.name)
def test_the_embedded_model_knows_its_tasks(task: Task) -> None:
    assert accuracy("demo", task, seed=999) >= 0.95


def test_the_embedded_model_is_small_and_does_not_know_the_new_task() -> None:
    assert sum(file.stat().st_size for file in EMBEDDED_FOLDER.iterdir()) < 8e6
    assert accuracy("demo", SHOUT, seed=999) == 0


def test_words_are_different_and_repeatable() -> None:
    assert words(500, 1) == words(500, 1)
    assert len(set(words(500, 1))) == 500
    assert words(5, 1) != words(5, 2)


@pytest.mark.slow
def test_the_demo_learns_the_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--runs-root", str(tmp_path)]) == 0
    (folder,) = list_runs(tmp_path)
    shown = capsys.readouterr().out
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    losses = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    assert losses[0][0] == 0
    assert losses[-1][1] < 0.1 * losses[0][1]
    assert f"{losses[0][1]:.4f}" in shown
    assert f"{losses[-1][1]:.4f}" in shown
    assert accuracy(str(folder.export), SHOUT, seed=999) >= 0.9
    for hint in (str(folder.export), "lightning-hub chat", "lightning-hub fit --config"):
        assert hint in shown.replace("\n", "")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "files"), [("osft", "config.json"), ("lora", "adapter_config.json")])
def test_a_method_of_the_demo_learns_and_what_was_known_is_tested_too(
    method: str, files: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["demo", "--method", method, "--runs-root", str(tmp_path)]) == 0
    (folder,) = list_runs(tmp_path)
    assert (folder.export / files).is_file()
    shown = capsys.readouterr().out
    known, new = (re.search(rf"right answers, {task}.*?(\d+)% +(\d+)%", shown) for task in ("knew", "new"))
    assert known is not None
    assert new is not None
    assert (known[1], new[1]) == ("100", "0")
    assert int(new[2]) >= 60
    assert accuracy(str(folder.export), SHOUT, seed=999) >= 0.6
