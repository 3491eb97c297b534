"""Runs in which no step was finished are not in the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_hub.cli import run
from lightning_hub.runs.folder import RunFolder, create_run
from lightning_hub.runs.metrics import read_metrics
from lightning_hub.runs.unused import holds_unused_run
from lightning_hub.runs.writer import RunWriter
from tests.conftest import WriteRows
from tests.runs.conftest import NEW


def ended(folder: RunFolder, state: str, step: int) -> RunFolder:
    writer = RunWriter.create(folder, NEW)
    writer.start_attempt("first start")
    writer.set_status(state, step=step, exit_code=2)  # type: ignore[arg-type]  # a word of the parameter list
    writer.close(2)
    return folder


def test_unused_runs_are_listed_with_all_only(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended(create_run("refused", root), "failed", 0)
    only = ["runs", "list", "--runs-root", str(root)]
    assert run(only) == 0
    assert capsys.readouterr().out == "1 run in which no step was finished: lightning-hub runs list --all\n"
    kept = [ended(create_run(*named), state, step) for named, state, step in (
        (("trained", root), "failed", 3), (("tried", root), "finished", 0), (("stopped", root), "stopped", 1)
    )]  # fmt: skip
    assert run([*only, "--json"]) == 0
    assert {view["id"] for view in json.loads(capsys.readouterr().out)} == {folder.id for folder in kept}
    assert run([*only, "--all", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 4


def test_what_is_unused_and_what_is_not(root: Path) -> None:
    assert holds_unused_run(ended(create_run("refused", root), "failed", 0))
    assert not holds_unused_run(ended(create_run("trained", root), "failed", 1))
    assert not holds_unused_run(ended(create_run("done", root), "finished", 0))
    saved = ended(create_run("saved", root), "failed", 0)
    saved.checkpoint(1).mkdir()
    assert not holds_unused_run(saved)
    live = RunWriter.create(create_run("live", root), NEW)
    live.start_attempt("first start")
    assert not holds_unused_run(live.folder)
    live.close()
    for name, files in {"begun": ["lock"], "foreign": ["lock", "thesis.tex"], "empty": []}.items():
        folder = root / name
        folder.mkdir()
        for file in files:
            (folder / file).touch()
        assert holds_unused_run(RunFolder(folder)) == (name == "begun")


def fit(folder: Path, rows: Path, *flags: str) -> int:
    # fmt: off
    return run([
        "fit", "--run-dir", str(folder), "--trainer.max_steps", "1", "--trainer.log_every_n_steps", "1",
        "--model", "SFT", "--model.model", "demo", "--data", "ChatData", "--data.train", str(rows),
        "--data.max_seq_len", "64", "--data.effective_batch_size", "8", "--trainer.accelerator", "cpu", *flags,
    ])
    # fmt: on


@pytest.mark.slow
def test_the_folder_of_a_refused_command_is_taken_by_the_next(
    tmp_path: Path, write_rows: WriteRows, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run")
    bad = write_rows([{"messages": "no list"}], name="bad.jsonl")
    good = write_rows(16)
    assert fit(folder.path, bad) == 2
    assert folder.run_json.exists()
    (folder.path / "thesis.tex").touch()
    capsys.readouterr()
    assert fit(folder.path, good) == 0, capsys.readouterr().err
    assert "held a run in which no step was finished; it is replaced" in capsys.readouterr().err
    assert folder.attempts() == [1]
    assert "bad.jsonl" not in folder.config.read_text()
    assert len(read_metrics(folder)) == 1
    assert (folder.path / "thesis.tex").exists()
    assert fit(folder.path, good) == 2, "one that has finished a step is kept"
    assert "the run folder is not empty" in capsys.readouterr().err
    assert read_metrics(folder)
