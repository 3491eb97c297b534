from __future__ import annotations

import json
import os
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _pytest.terminal import TerminalReporter
from hypothesis import HealthCheck, settings

from lightning_hub.demo.tasks import SHOUT, conversations
from tests.cases import count_cases, note_cases

os.environ["HF_HUB_OFFLINE"] = "1"

# A loaded machine is no fault of the code; in CI the same examples are drawn each time.
settings.register_profile(
    "house", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("house")


PRIVATE = ("HOME", "XDG_CACHE_HOME", "HF_HOME", "LIGHTNING_HUB_RUNS", "LIGHTNING_HUB_CACHE")
"""Variables that name folders of a person; tests have folders of their own."""

OF_LAUNCHERS = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_.*|GROUP_.*|ROLE_.*|MASTER_.*|NODE_RANK|NNODES|NPROC_PER_NODE|TORCHELASTIC_.*|SLURM_.*"
    r"|PMI_.*|OMPI_.*|ACCELERATE_.*|CUDA_VISIBLE_DEVICES|PL_.*|HF_TOKEN|HF_HUB_CACHE|TRANSFORMERS_CACHE"
    r"|LIGHTNING_HUB_.*|COLUMNS|LINES|NO_COLOR|FORCE_COLOR)"
)
"""Variables that change what a command does; a test that wants one sets it itself."""


@pytest.fixture(scope="session", autouse=True)
def private_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hide the runs, the home folder, the cache and the settings of whoever runs the tests."""
    before = dict(os.environ)
    for name in [name for name in os.environ if OF_LAUNCHERS.fullmatch(name)]:
        del os.environ[name]
    for name in PRIVATE:
        os.environ[name] = str(tmp_path_factory.mktemp(name.lower()))
    yield
    os.environ.clear()
    os.environ.update(before)


PATIENCE = 300.0
"""Seconds after which a process counts as hung: on a busy machine the imports of four ranks alone take a minute."""


def time_of_children() -> float:
    """Return the CPU time of the processes that this one has waited for: a busy machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def write_conversations(path: Path, rows: list[dict[str, object]] | int) -> Path:
    """Write rows, or so many shouted words, as a JSONL file."""
    listed = conversations((SHOUT,), rows, seed=3) if isinstance(rows, int) else rows
    path.write_text("".join(json.dumps(row) + "\n" for row in listed), encoding="utf-8")
    return path


WriteRows = Callable[..., Path]


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Return a function that writes rows (by default shouted words) as a JSONL file."""

    def write(rows: list[dict[str, object]] | int = 40, name: str = "rows.jsonl") -> Path:
        return write_conversations(tmp_path / name, rows)

    return write


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    note_cases(items)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # so that none is left over for one worker


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    for line in count_cases(terminalreporter):
        terminalreporter.write_line(line)
    skipped = terminalreporter.stats.get("skipped", [])
    terminalreporter.write_line(f"{len(skipped)} tests skipped" + (", for the reasons above" if skipped else ""))
