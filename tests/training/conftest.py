from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_hub.cli import run
from lightning_hub.runs.folder import RunFolder
from tests.conftest import WriteRows

Fit = Callable[..., tuple[int, RunFolder]]


@pytest.fixture
def fit(tmp_path: Path, write_rows: WriteRows) -> Fit:
    """Return a function that trains the embedded model on a few shouted words and returns exit code and run."""

    def train(
        *flags: str,
        folder: str = "run",
        rows: Path | None = None,
        val: str = "0.2",
        method: str = "SFT",
        command: Callable[[list[str]], int] = run,
    ) -> tuple[int, RunFolder]:
        data = rows or tmp_path / "rows.jsonl"
        if not data.exists():
            write_rows(40)
        # fmt: off
        code = command([
            "fit", "--run-dir", str(tmp_path / folder), "--trainer.log_every_n_steps", "1",
            "--model", method, "--model.model", "demo", "--model.learning_rate", "1e-3",
            "--data", "ChatData", "--data.train", str(data), "--data.val", val, "--data.max_seq_len", "64",
            "--data.effective_batch_size", "8", *flags,
        ])
        # fmt: on
        return code, RunFolder(tmp_path / folder)

    return train
