from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch

from lightning_hub.cli import run
from lightning_hub.demo.methods import share, write_facts
from lightning_hub.demo.tasks import PRETRAINING, SHOUT, Task, conversations, numbers, turned_words, words
from lightning_hub.models.generation import complete
from lightning_hub.models.pretrained import EMBEDDED_FOLDER, ROOM_FOLDER, Pretrained
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
    for hint in (str(folder.export), "lightning-hub chat", "lightning-hub fit sft "):
        assert hint in shown.replace("\n", "")


def test_the_model_with_room_knows_its_task_and_not_the_new_one() -> None:
    assert share(str(ROOM_FOLDER), turned_words(100, seed=5)) >= 0.95
    assert share(str(ROOM_FOLDER), numbers(30, seed=5)) == 0


def test_the_embedded_models_take_8_mb_at_most() -> None:
    assert sum(file.stat().st_size for folder in (EMBEDDED_FOLDER, ROOM_FOLDER) for file in folder.iterdir()) < 8e6


def test_every_file_of_an_embedded_model_is_shipped() -> None:
    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["lightning_hub"]
    for folder in (EMBEDDED_FOLDER, ROOM_FOLDER):
        assert f"models/{folder.name}/*" in patterns


def test_the_tasks_of_the_model_with_room_share_no_letter() -> None:
    letters = [
        {letter for row in rows for turn in row["messages"] for letter in turn["content"]}
        for rows in (turned_words(500, 1), numbers(30, 1))
    ]
    assert not letters[0] & letters[1]


def test_a_method_is_asked_what_it_was_trained_on(tmp_path: Path) -> None:
    train, val = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in write_facts(tmp_path, seed=3)
    )
    assert val == numbers(30, 3)
    assert len({row["messages"][0]["content"] for row in val}) == 30
    assert [row for row in val if row not in train] == []
    assert [row for row in train if row not in val] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "files", "kept", "learnt"),
    [
        ("sft", "config.json", (0, 50), 80),
        ("osft", "config.json", (80, 100), 80),
        ("lora", "adapter_config.json", (0, 50), 10),
    ],
)
def test_a_method_of_the_demo_learns_and_what_was_known_is_tested_too(
    method: str, files: str, kept: tuple[int, int], learnt: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["demo", "--method", method, "--runs-root", str(tmp_path)]) == 0
    (folder,) = list_runs(tmp_path)
    assert (folder.export / files).is_file()
    shown = capsys.readouterr().out
    known, new = (re.search(rf"right answers, {task}.*?(\d+)% +(\d+)%", shown) for task in ("knew", "new"))
    assert known is not None
    assert new is not None
    assert (known[1], new[1]) == ("100", "0")
    assert kept[0] <= int(known[2]) <= kept[1]
    assert int(new[2]) >= learnt
    found = {"knew": turned_words(100, seed=999), "new": numbers(30, seed=7)}
    assert [round(100 * share(str(folder.export), rows)) for rows in found.values()] == [int(known[2]), int(new[2])]
