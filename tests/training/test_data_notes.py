"""What a run and ``lightning-hub data`` say of their input before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_hub.cli import run
from tests.training.conftest import Fit

ROWS = [{"question": "Shout kamo.", "answer": "KAMO", "id": number} for number in range(20)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"question": "q", "answer": ""}]))
    return path


NOTES = ("prompt_completion (prompt: question, completion: answer)", "column id is not read: 20", "empty answers: 1")


@pytest.mark.slow
def test_a_run_names_its_layout_and_what_it_does_not_read(
    fit: Fit, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, folder = fit("--trainer.max_steps", "1", rows=rows)
    shown = capsys.readouterr()
    assert code == 0, shown.err
    report = json.loads((folder.path / "data_report.json").read_text())
    assert report["notes"]["column id is not read"] == 20
    for note in NOTES:
        assert note in shown.out + shown.err, note


def test_the_data_verb_names_the_same(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "SFT", "--model.model", "demo", "--data", "ChatData", "--data.train", str(rows)]
    assert run(["data", *words]) == 0
    shown = capsys.readouterr().out
    for note in NOTES:
        assert note in shown, note
