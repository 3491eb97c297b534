"""A run that was started with relative paths is resumed, exported and tried from any working folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lightning_hub.cli import run
from lightning_hub.config.paths import with_absolute_paths
from lightning_hub.runs.folder import RunFolder
from tests.conftest import WriteRows
from tests.training.conftest import Fit


def test_what_is_a_path_becomes_absolute_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "gen1", "plain", "my template", "q_proj", "sft"):
        (tmp_path / name).touch()

    def at(name: str) -> str:
        return str(tmp_path / name)

    forgetting = {"class_path": "Forgetting", "init_args": {"eval_also": {"old": ["a.jsonl", "org/data"]}}}
    best = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": "kept", "monitor": "a.jsonl"},
    }
    tree = {
        "seed_everything": 1,
        "trainer": {"default_root_dir": None, "strategy": "sft", "callbacks": [forgetting, best], "logger": False},
        "model": {"class_path": "x.LoRA", "init_args": {"model": "gen1", "adapter": "../a", "targets": ["q_proj"]}},
        "data": {"class_path": "ChatData", "init_args": {
            "train": [{"path": "a.jsonl", "weight": 2.0, "name": "b.jsonl"}, {"path": "org/name"}, {"path": "*.jsonl"}],
            "val": 0.1, "predict": "./b.jsonl", "chat_template": "plain",
        }},
    }  # fmt: skip
    found = with_absolute_paths(tree)  # type: ignore[arg-type]  # a literal of many kinds
    options = {section: found[section]["init_args"] for section in ("model", "data")}  # type: ignore[index, call-overload]
    assert options["model"] == {"model": at("gen1"), "adapter": "../a", "targets": ["q_proj"]}
    assert options["data"] == {
        "train": [{"path": at("a.jsonl"), "weight": 2.0, "name": "b.jsonl"}, {"path": "org/name"},
                  {"path": at("*.jsonl")}],
        "val": 0.1, "predict": at("b.jsonl"), "chat_template": "plain",
    }  # fmt: skip
    trainer = found["trainer"]
    assert isinstance(trainer, dict)
    assert trainer["strategy"] == "sft"
    first, second = (callback["init_args"] for callback in trainer["callbacks"])  # type: ignore[union-attr, index, call-overload]
    assert first == {"eval_also": {"old": [at("a.jsonl"), "org/data"]}}
    assert second == {"dirpath": at("kept"), "monitor": "a.jsonl"}
    assert with_absolute_paths(found) == found
    assert with_absolute_paths(tree, kept=tree)["model"] == tree["model"], "what a run has stored stays"  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_is_used_from_another_folder(
    fit: Fit, tmp_path: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, first = fit("--trainer.max_steps", "1", folder="first")
    first.export.rename(tmp_path / "gen1")
    monkeypatch.chdir(tmp_path)
    relative = ("--model.model", "gen1", "--trainer.max_epochs", "1", "--data.train", "rows.jsonl")
    code, folder = fit(*relative, method="LoRA", folder="second")
    assert code == 0, capsys.readouterr().err
    assert '# --model.model "gen1"' in folder.config_input.read_text(), "what was given stays word for word"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    named = json.loads((folder.export / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "gen1")
    assert run(["export", str(folder.path), "--to", "adapter"]) == 0
    assert run(["export", str(folder.path), "--merge", "--to", "merged"]) == 0
    assert run(["runs", "resume", str(folder.path), "--trainer.max_epochs", "2"]) == 0, capsys.readouterr().err
    read, write = os.pipe()
    os.write(write, b"hello\n")
    os.close(write)
    with os.fdopen(read) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert run(["chat", str(folder.path), "--max-new-tokens", "4"]) == 0
    assert RunFolder(folder.path).info().model == str(tmp_path / "gen1")
