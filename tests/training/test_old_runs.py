"""Run folders and checkpoints that an earlier version wrote are read and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lightning_hub.cli import run
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.metrics import read_metrics

OLD = Path(__file__).parent / "old_runs"
LOSSES = [6.019571304321289, 5.919400215148926, 5.823105812072754, 5.727353572845459]
"""What the version that wrote the folders computed: two steps in them, two after a resume."""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the old folders, with the paths in them set to where they are now."""
    target = tmp_path / "old"
    shutil.copytree(OLD, target, symlinks=True)
    for path in target.rglob("*.yaml"):
        path.write_text(path.read_text().replace("/tmp/old", str(target)))
    return target


@pytest.mark.parametrize("name", ["one", "fsdp2"])
def test_an_old_run_is_shown(name: str, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["runs", "show", str(old / name), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["state"], shown["step"], shown["method"]) == ("finished", 2, "sft")
    assert shown["loss"] == pytest.approx(LOSSES[1])
    assert run(["runs", "metrics", str(old / name), "--json"]) == 0


@pytest.mark.parametrize("name", ["one", "fsdp2"])
def test_an_old_run_is_resumed(name: str, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_process = ["--trainer.strategy", "auto", "--trainer.devices", "1"]
    assert run(["runs", "resume", str(old / name), "--trainer.max_steps", "4", *one_process]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "could not be compared" in line]
    assert notes == ["note: the training samples could not be compared: an earlier version wrote the checkpoint"]
    found = [line["loss"] for line in read_metrics(RunFolder(old / name)) if "loss" in line]
    assert found == pytest.approx(LOSSES, rel=1e-5)
    before = load_file(OLD / "model" / "model.safetensors")
    after = load_file(old / name / "export" / "model.safetensors")
    assert after.keys() == before.keys()
    assert not any(after[tensor].equal(before[tensor]) for tensor in after)
