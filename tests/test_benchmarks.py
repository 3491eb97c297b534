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
def test_the_benchmark_of_forgetting_runs_in_small() -> None:
    command = [sys.executable, "-m", "benchmarks.forgetting", "--quick"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    leaks = dict(re.findall(r"^(osft|osft thin|peft osf|factors) +([0-9.e+-]+)$", done.stdout, re.MULTILINE))
    assert float(leaks["osft"]) < 1e-5
    assert float(leaks["osft thin"]) < 1e-5
    assert float(leaks["factors"]) < 1e-3
    assert float(leaks["peft osf"]) > 0.01, "gradients alone do not keep an optimizer inside"
