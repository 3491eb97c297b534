"""What every benchmark shares: results as JSON lines with all that explains them, tables, alternated rounds."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import psutil

from lightning_hub.runs.environment import describe_environment, git_state
from lightning_hub.runs.files import Json

RESULTS = Path(__file__).with_name("results")

ROOT = Path(__file__).parents[1]
"""Where ``python -m benchmarks.<name>`` is run, by a parent or a child."""

QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
ONE_THREAD = QUIET | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""The environment in which CPU time is what a wall clock would read on an idle machine."""


def child_environment(**more: str) -> dict[str, str]:
    """Return this process's environment with ``more`` in it, for a child that imports the same packages."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path), **more}


def record(name: str, values: dict[str, Json], device: str | None = None) -> Path:
    """Append a result to ``results/<name>.jsonl`` and say where it went.

    Args:
        name: Name of the benchmark.
        values: What was measured.
        device: Name of the accelerator, where one was measured.
    """
    environment = describe_environment()
    line: dict[str, Json] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m", f"benchmarks.{name}", *sys.argv[1:]]),
        "processor": _processor(),
        "cpus": environment["cpus"],
        "memory_gb": environment["memory_gb"],
        "device": device,
        "load_average": [round(load, 2) for load in psutil.getloadavg()],
        "python": environment["python"],
        "packages": environment["packages"],
        "git": git_state(),
        **values,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(f"\nload average {psutil.getloadavg()[0]:.2f}; appended to {path.relative_to(ROOT)}")
    return path


def _processor() -> str:
    """Return the model of the processor; ``platform`` knows only its architecture on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows below their head, the first column to the left and numbers to the right."""
    texts = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(head))]
    for row in texts:
        cells = [cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in
                 enumerate(zip(row, widths, strict=True))]  # fmt: skip
        print("  ".join(cells).rstrip(), flush=True)


def alternated(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Yield round and name; every second round goes backwards, so that a drift of the machine meets all alike."""
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            yield number, name


def middle(values: Sequence[float]) -> float:
    """Return the median."""
    return float(statistics.median(values))


def spread(values: Sequence[float]) -> float:
    """Return the largest minus the smallest value."""
    return max(values) - min(values)
