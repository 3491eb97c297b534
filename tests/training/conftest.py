from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from lightning_hub.cli import run
from lightning_hub.runs.folder import RunFolder
from tests.conftest import write_conversations

Fit = Callable[..., tuple[int, RunFolder]]


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    """Return a function that trains the embedded model on a few shouted words and returns exit code and run."""
    return partial(train, tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of one epoch, for tests that look at it and change nothing."""
    code, folder = train(tmp_path_factory.mktemp("trained"))
    assert code == 0
    return folder


def train(
    place: Path,
    *flags: str,
    folder: str = "run",
    rows: Path | None = None,
    val: str = "0.2",
    method: str = "SFT",
    command: Callable[[list[str]], int] = run,
) -> tuple[int, RunFolder]:
    """Train in a folder of ``place``."""
    data = rows or place / "rows.jsonl"
    if not data.exists():
        write_conversations(data, 40)
    # fmt: off
    code = command([
        "fit", "--run-dir", str(place / folder), "--trainer.log_every_n_steps", "1",
        "--model", method, "--model.model", "demo", "--model.learning_rate", "1e-3",
        "--data", "ChatData", "--data.train", str(data), "--data.val", val, "--data.max_seq_len", "64",
        "--data.effective_batch_size", "8", *flags,
    ])
    # fmt: on
    return code, RunFolder(place / folder)
