"""Benchmarks that are long run here in small, so that they cannot rot."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(("scene", "leak_steps"), [("room", 20), ("embedded", 0)])
def test_the_benchmark_of_forgetting_runs_in_small(scene: str, leak_steps: int, tmp_path: Path) -> None:
    options = ["--quick", "--scene", scene, "--leak-steps", str(leak_steps)]
    command = [sys.executable, "-m", "benchmarks.forgetting", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LIGHTNING_HUB_CACHE": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\w[\w -]*\w) +[0-9.e-]+ +[0-9]+ ", done.stdout, re.MULTILINE)
    assert {"sft", "sft targets", "lora", "osft", "osft thin", "peft osf", "factors"} <= set(rows)
    leaks = dict(re.findall(r"^(osft|osft thin|peft osf|factors) +([0-9.e+-]+)$", done.stdout, re.MULTILINE))
    if not leak_steps:
        return
    assert float(leaks["osft"]) < 1e-5
    assert float(leaks["osft thin"]) < 1e-5
    assert float(leaks["factors"]) < 1e-3
    assert float(leaks["peft osf"]) > 0.01, "gradients alone do not keep an optimizer inside"
