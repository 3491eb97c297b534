"""Benchmarks that are long run here in small, so that they cannot rot."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.keepers import NAMES
from tests.warm import Warm


@pytest.mark.slow
def test_the_benchmark_of_forgetting_runs_in_small(tmp_path: Path) -> None:
    said = run_in_small("benchmarks.forgetting", tmp_path, "--leak-steps", "20")
    rows = re.findall(r"^(\w[\w -]*\w) +[0-9.e-]+ +[0-9]+ ", said, re.MULTILINE)
    assert set(NAMES) <= set(rows)
    leaks = dict(re.findall(r"^(osft|osft thin|peft osf|factors) +([0-9.e+-]+)$", said, re.MULTILINE))
    assert float(leaks["osft"]) < 1e-5
    assert float(leaks["osft thin"]) < 1e-5
    assert float(leaks["factors"]) < 1e-3
    assert float(leaks["peft osf"]) > 0.01, "gradients alone do not keep an optimizer inside"


@pytest.mark.slow
def test_its_other_scene_runs_in_small(tmp_path: Path) -> None:
    said = run_in_small("benchmarks.forgetting", tmp_path, "--scene", "embedded", "--only", "osft", "--leak-steps", "0")
    assert "accuracy on: known, shout, double" in said


@pytest.mark.slow
def test_the_benchmark_of_the_demo_runs_in_small(tmp_path: Path) -> None:
    said = run_in_small("benchmarks.demo_room", tmp_path, "--only", "osft", "--new-models")
    assert re.search(r"^0 +osft +0 % +0 % +0 % +0 %$", said, re.MULTILINE)


@pytest.mark.slow
def test_taking_changes_back_runs_in_small(tmp_path: Path) -> None:
    said = run_in_small("benchmarks.undone", tmp_path)
    assert re.search(r"^model.layers.1.mlp.down_proj +[01]", said, re.MULTILINE)


def run_in_small(module: str, cache: Path, *options: str) -> str:
    """Run a benchmark as little as it can, and return what it prints."""
    argv = ["-m", module, "--quick", *options]
    code, said, error = Warm(argv, cache, env={"LIGHTNING_HUB_CACHE": str(cache)}).finished()
    assert code == 0, error
    return said
