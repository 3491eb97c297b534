"""Tests see nothing of the person who runs them: their runs, home folder, cache and environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TESTS = ("tests/training/test_chat.py", "tests/commands/test_runs.py", "tests/launch/test_environment.py")
"""Quick tests of verbs that look for runs, and of what is read from the environment."""


@pytest.mark.slow
def test_nothing_of_the_person_changes_a_test(tmp_path: Path) -> None:
    for place in (tmp_path / "runs", tmp_path / "planted"):
        run = place / "demo-20261126-000000"
        (run / "export").mkdir(parents=True)
        (run / "run.json").write_text(json.dumps({"schema": 1, "id": run.name, "created": "2026-11-26T00:00:00Z"}))
    (tmp_path / ".cache" / "lightning-hub").mkdir(parents=True)
    (tmp_path / ".cache" / "lightning-hub").chmod(0o500)
    planted = {
        "HOME": str(tmp_path),
        "LIGHTNING_HUB_RUNS": str(tmp_path / "planted"),
        "LIGHTNING_HUB_CACHE": "/proc/nowhere",
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "192.0.2.1",
        "NNODES": "4",
        "SLURM_NTASKS": "8",
        "COLUMNS": "20",
        "PYTHONPATH": str(ROOT),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "-x",
        "--rootdir",
        str(ROOT),
        "-c",
        str(ROOT / "pyproject.toml"),
    ]
    done = subprocess.run(
        [*command, *(str(ROOT / test) for test in TESTS)],
        cwd=tmp_path,  # whose runs/ is planted, too
        env={**os.environ, **planted},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
