"""Ranks do not outlive what started them, however early it is killed; a new attempt ends those that do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from lightning_hub.launch.orphans import end_orphans, find_orphans
from lightning_hub.parent import SUPERVISOR_VARIABLE
from lightning_hub.runs.files import write_json
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.process_identity import ProcessIdentity
from tests.conftest import PATIENCE

HELD = """
import sys, time
from pathlib import Path

class Held:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            folder = Path({folder!r})
            (folder / f"importing-{{__import__('os').getpid()}}").touch()
            end = time.monotonic() + 60
            while not (folder / "go on").exists() and time.monotonic() < end:
                time.sleep(0.01)

sys.meta_path.insert(0, Held())
"""
"""A process that imports torch says so, and is held there until it is told to go on."""


def wait_until(holds: Callable[[], bool], limit: float = PATIENCE) -> None:
    end = time.monotonic() + limit
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Return an environment in which ranks are held where they import torch; none of them is left behind."""
    (tmp_path / "sitecustomize.py").write_text(HELD.format(folder=str(tmp_path)))
    yield {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
    for pid in importing(tmp_path):
        if psutil.pid_exists(pid):
            psutil.Process(pid).kill()


def importing(folder: Path) -> list[int]:
    return [int(path.name.partition("-")[2]) for path in folder.glob("importing-*")]


def fit_words(tmp_path: Path, rows: Path, *flags: str) -> list[str]:
    # fmt: off
    return [
        "-m", "lightning_hub", "fit", "--model", "SFT", "--model.model", "demo", "--data", "ChatData",
        "--data.train", str(rows), "--data.max_seq_len", "64", "--data.effective_batch_size", "8",
        "--trainer.accelerator", "cpu", "--run-dir", str(tmp_path / "run"), *flags,
    ]
    # fmt: on


@pytest.mark.fault("F6")
@pytest.mark.fault("F30")
def test_ranks_that_are_still_importing_end_with_their_supervisor(
    tmp_path: Path, held: dict[str, str], write_rows: Callable[..., Path]
) -> None:
    words = fit_words(tmp_path, write_rows(40), "--trainer.devices", "2")
    supervisor = subprocess.Popen([sys.executable, *words], env=held)
    wait_until(lambda: len(importing(tmp_path)) == 2)
    supervisor.kill()
    supervisor.wait()
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in importing(tmp_path)), 5)
    assert not RunFolder(tmp_path / "run").metrics.exists()


@pytest.mark.slow
@pytest.mark.fault("F5")
def test_ranks_that_are_still_importing_end_with_the_agent_of_torchrun(
    tmp_path: Path, held: dict[str, str], write_rows: Callable[..., Path]
) -> None:
    agent_code = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != 'Held'];" + (
        "from torch.distributed.run import main; main()"  # the agent itself needs torch
    )
    words = ["-c", agent_code, "--standalone", "--nproc-per-node", "2"]
    agent = subprocess.Popen([sys.executable, *words, *fit_words(tmp_path, write_rows(40))], env=held)
    wait_until(lambda: len(importing(tmp_path)) == 2)
    agent.kill()
    agent.wait()
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in importing(tmp_path)), 5)


def test_a_rank_whose_supervisor_is_gone_before_it_asks_ends_at_once() -> None:
    script = "import lightning_hub; print('it goes on')"
    environ = {**os.environ, SUPERVISOR_VARIABLE: "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-9, "")
    told = {**environ, SUPERVISOR_VARIABLE: str(os.getpid())}
    script += "; import os; print(os.environ.get('LIGHTNING_HUB_SUPERVISOR_PID'))"
    done = subprocess.run([sys.executable, "-c", script], env=told, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "it goes on\nNone\n")


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def identity_of(process: subprocess.Popen[bytes]) -> dict[str, object]:
    found = ProcessIdentity.of(process.pid)
    assert found is not None
    return dict(found.to_json())


@pytest.mark.parametrize("told_by", ["heartbeat", "lease"])
def test_a_new_attempt_ends_what_an_earlier_one_left(
    tmp_path: Path, sleeper: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str], told_by: str
) -> None:
    folder = RunFolder(tmp_path / "run")
    files = folder.rank(1, 3)
    files.path.mkdir(parents=True)
    identity = identity_of(sleeper)
    if told_by == "heartbeat":
        write_json(files.heartbeat, {"phase": "train", **identity})
    else:
        folder.node(0).path.mkdir(parents=True)
        child = {"rank": 3, "pid": identity.pop("pid"), "pid_start": identity.pop("pid_start"), "exit_code": None}
        write_json(folder.node(0).lease, {"attempt": 1, "children": [child], **identity})
    end_orphans(folder)
    assert sleeper.wait(5) == -9
    said = capsys.readouterr().err
    assert said == f"note: rank 3 of attempt 1 (process {sleeper.pid}) still ran without its supervisor and was ended\n"
    assert find_orphans(folder) == []


@pytest.mark.fault("F45")
@pytest.mark.parametrize("other", ["start", "boot", "phase"])
def test_a_process_that_is_not_the_rank_is_left_alone(
    tmp_path: Path, sleeper: subprocess.Popen[bytes], other: str
) -> None:
    files = RunFolder(tmp_path / "run").rank(1, 0)
    files.path.mkdir(parents=True)
    changes: dict[str, dict[str, object]] = {
        "start": {"pid_start": 1.0},
        "boot": {"boot_id": "another"},
        "phase": {"phase": "exit"},
    }
    write_json(files.heartbeat, {"phase": "train", **identity_of(sleeper), **changes[other]})
    end_orphans(RunFolder(tmp_path / "run"))
    assert sleeper.poll() is None


def test_a_rank_that_has_written_nothing_is_known_by_its_environment(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.attempt(1).mkdir(parents=True)
    told = {"LIGHTNING_HUB_RUN_DIR": str(folder.path), "TORCHELASTIC_RUN_ID": "run", "LIGHTNING_HUB_ATTEMPT": "1"}
    environ = {**os.environ, **told, "RANK": "1"}
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=environ) as rank:
        wait_until(lambda: json.dumps(psutil.Process(rank.pid).cmdline()).find("input") > 0, 5)
        assert [(found.rank, found.attempt) for found in find_orphans(folder)] == [(1, 1)]
        end_orphans(folder)
        assert rank.wait(5) == -9
