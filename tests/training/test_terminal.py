"""A terminal that is closed, a reader that goes, streams that were never open: the training goes on to its end."""

from __future__ import annotations

import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.metrics import read_metrics
from tests.conftest import PATIENCE, WriteRows

STEPS = 4
HELD = """
import os, sys, time
from pathlib import Path

def hold():
    folder = Path({folder!r})
    (folder / "before training").touch()
    end = time.monotonic() + 60
    while not (folder / "go on").exists() and time.monotonic() < end:
        time.sleep(0.01)

class Watch:
    def find_spec(self, name, path, target=None):
        if name == "lightning_hub.training.session":
            sys.meta_path.remove(self)
            from lightning_hub.callbacks.recorder import Recorder
            plain = Recorder.on_train_start
            def held(self, *args):
                hold()
                plain(self, *args)
            Recorder.on_train_start = held

sys.meta_path.insert(0, Watch())
"""
"""Rank 0 waits at the start of its training until it is told to go on."""


@pytest.fixture
def command(tmp_path: Path, write_rows: WriteRows) -> list[str]:
    # fmt: off
    return [
        sys.executable, "-m", "lightning_hub", "fit", "--model", "SFT", "--model.model", "demo", "--data", "ChatData",
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


@pytest.mark.slow
@pytest.mark.fault("F28")
@pytest.mark.parametrize("devices", ["1", "2"])
def test_a_closed_terminal_ends_no_run(tmp_path: Path, command: list[str], devices: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(HELD.format(folder=str(tmp_path)))
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(command[0], [*command, "--trainer.devices", devices], environ)
    wait_until((tmp_path / "before training").exists)
    os.close(terminal)  # the system sends SIGHUP, and whatever is printed from now on fails
    (tmp_path / "go on").touch()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert_finished(RunFolder(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "tail"),
    [("1", "| head -1"), ("1", "<&- >&- 2>&-"), ("1", "> /dev/full"), ("2", "2>&1 | true"), ("2", "<&- >&- 2>&-")],
)
def test_streams_that_nobody_reads_end_no_run(tmp_path: Path, command: list[str], devices: str, tail: str) -> None:
    line = f"{shlex.join([*command, '--trainer.devices', devices])} {tail}"
    script = f"set -o pipefail\n{line}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if tail == "> /dev/full":
        assert done.stderr.count("cannot be written (No space left on device)") == 1
    assert_finished(RunFolder(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("tail", ["| true", "2>&1 | true"])
def test_a_failed_run_never_ends_with_0(tmp_path: Path, command: list[str], tail: str) -> None:
    held = HELD.format(folder=str(tmp_path))
    failing = held.replace("                hold()", "                raise BrokenPipeError(32, 'Broken pipe')")
    assert failing != held
    (tmp_path / "sitecustomize.py").write_text(failing)
    line = shlex.join(["env", f"PYTHONPATH={tmp_path}:{Path.cwd()}", *command])
    script = f"set -o pipefail\n{line} {tail}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1, done.stderr
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
