"""A terminal that is closed, a reader that goes, streams that were never open: the training goes on to its end."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.metrics import read_metrics
from tests.conftest import PATIENCE, WriteRows
from tests.warm import Warm

STEPS = 4
CLOSED = "<&- >&- 2>&-"


def at_the_start(event: Callable[[], None]) -> None:
    """Let something happen in rank 0 at the start of its training."""
    from lightning_hub.callbacks.recorder import Recorder

    plain: Any = Recorder.on_train_start

    def then(self: Any, *args: Any) -> None:
        if self.run is not None:
            event()
        plain(self, *args)

    Recorder.on_train_start = then  # type: ignore[assignment, method-assign]


def hold(folder: Path) -> None:
    """Wait until the test says so."""
    (folder / "before training").touch()
    wait_until((folder / "go on").exists, 60)


def fail() -> None:
    raise BrokenPipeError(32, "Broken pipe")


def in_terminal(name: str) -> None:
    """Make a terminal the one of this process, as a shell's is."""
    os.setsid()
    opened = os.open(name, os.O_RDWR)
    for number in range(3):
        os.dup2(opened, number)
    os.close(opened)


def behind(tail: str) -> None:
    """Lead the streams of this process where a shell would, for what stands behind a command."""
    if tail == CLOSED:
        for number in range(3):
            os.close(number)
    elif tail == "> /dev/full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    else:
        both, _, reader = tail.rpartition("| ")
        reading, writing = os.pipe()
        subprocess.Popen(shlex.split(reader), stdin=reading)
        os.close(reading)
        os.dup2(writing, 1)
        if both:
            os.dup2(writing, 2)
        os.close(writing)


@pytest.fixture
def command(tmp_path: Path, write_rows: WriteRows) -> list[str]:
    # fmt: off
    return [
        "-m", "lightning_hub", "fit", "--model", "SFT", "--model.model", "demo", "--data", "ChatData",
        "--data.train", str(write_rows(40)), "--data.max_seq_len", "64", "--data.effective_batch_size", "8",
        "--trainer.max_steps", str(STEPS), "--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu",
        "--run-dir", str(tmp_path / "run"),
    ]
    # fmt: on


def assert_finished(folder: RunFolder) -> None:
    assert [line["step"] for line in read_metrics(folder) if "loss" in line] == list(range(1, STEPS + 1))
    assert json.loads(folder.status.read_text())["state"] == "finished"
    assert folder.export.is_dir()
    assert "done " in folder.rank(1, 0).stdout.read_text(), "the log has what the terminal has not"


def wait_until(holds: Callable[[], bool], limit: float = PATIENCE) -> None:
    end = time.monotonic() + limit
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def both(*steps: Callable[[], object]) -> None:
    for step in steps:
        step()


@pytest.mark.slow
@pytest.mark.fault("F28")
@pytest.mark.parametrize("devices", ["1", "2"])
def test_a_closed_terminal_ends_no_run(tmp_path: Path, command: list[str], devices: str) -> None:
    terminal, other_end = os.openpty()
    held = partial(at_the_start, partial(hold, tmp_path))
    first = partial(both, partial(in_terminal, os.ttyname(other_end)), held)
    process = Warm([*command, "--trainer.devices", devices], tmp_path, first=first)
    wait_until((tmp_path / "before training").exists)
    os.close(other_end)
    os.close(terminal)  # the system sends SIGHUP, and whatever is printed from now on fails
    (tmp_path / "go on").touch()
    assert process.wait() == 0
    assert_finished(RunFolder(tmp_path / "run"))


@pytest.mark.slow
def test_streams_that_were_never_open_end_no_run(tmp_path: Path, command: list[str]) -> None:
    line = f"{shlex.join([sys.executable, *command])} {CLOSED}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert_finished(RunFolder(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "tail"),
    [("1", "| head -1"), ("1", "> /dev/full"), ("2", "2>&1 | true"), ("2", CLOSED)],
)
def test_streams_that_nobody_reads_end_no_run(tmp_path: Path, command: list[str], devices: str, tail: str) -> None:
    process = Warm([*command, "--trainer.devices", devices], tmp_path, first=partial(behind, tail))
    code, _, error = process.finished()
    assert code == 0, error
    assert "Traceback" not in error
    assert "Exception ignored" not in error
    if tail == "> /dev/full":
        assert error.count("cannot be written (No space left on device)") == 1
    assert_finished(RunFolder(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("tail", ["| true", "2>&1 | true"])
def test_a_failed_run_never_ends_with_0(tmp_path: Path, command: list[str], tail: str) -> None:
    first = partial(both, partial(behind, tail), partial(at_the_start, fail))
    code, _, error = Warm(command, tmp_path, first=first).finished()
    assert code == 1, error
    assert json.loads(RunFolder(tmp_path / "run").status.read_text())["state"] == "failed"


def test_a_reader_that_has_seen_enough_is_no_failure_of_a_listing() -> None:
    line = f"{shlex.quote(sys.executable)} -m lightning_hub schema | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_hangups_are_heard_again_afterwards() -> None:
    from lightning_hub.runs.terminal import independent_of_terminal

    before = signal.getsignal(signal.SIGHUP)
    with independent_of_terminal():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) == before
