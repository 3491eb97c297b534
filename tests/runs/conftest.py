from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from lightning_hub.runs.folder import RunFolder, create_run
from lightning_hub.runs.writer import NewRun, RunWriter

settings.register_profile("hub", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("hub")

Write = Callable[[int, bytes], int]


@pytest.fixture
def write_some() -> Callable[[int], Write]:
    """A disk with room for so many bytes: one short write, then none."""

    def make(room: int) -> Write:
        real, left = os.write, [room]

        def write(descriptor: int, data: bytes) -> int:
            if not left[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = real(descriptor, data[: left[0]])
            left[0] -= written
            return written

        return write

    return make


NEW = NewRun(
    name="sft", method="sft", model="tiny", config="model: {class_path: SFT}\n", inputs=[("a.yaml", "# mine\na: 1\n")]
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def folder(root: Path) -> RunFolder:
    return create_run("sft", root)


@pytest.fixture
def run(folder: RunFolder) -> RunWriter:
    return RunWriter.create(folder, NEW)
