"""Runs made by the real writers, in this process and in others that are stopped and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_hub.runs.files import read_json, write_json
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.heartbeat import MAX_HEARTBEAT_BYTES, HeartbeatFile, RankActivity, heartbeat_period
from lightning_hub.runs.rank_writer import STACKS_SIGNAL, RankWriter, classify
from lightning_hub.runs.reader import RunReader, first_error, read_run
from lightning_hub.runs.records import Heartbeat, Lease
from lightning_hub.runs.run_state import Limits
from lightning_hub.runs.writer import NewRun, RunWriter, input_text

TRAINER = """
import sys, time
from pathlib import Path
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.rank_writer import RankWriter
from lightning_hub.runs.writer import RunWriter
run = RunWriter(RunFolder(Path(sys.argv[1])))
rank = RankWriter(run.folder, run.start_attempt("test"), trouble=run.trouble)
rank.start()
run.set_status("running", max_steps=10)
rank.activity.phase, rank.activity.step, rank.activity.loss = "train", 3, 0.5
rank.activity.begin("forward")
rank.log(3, {"loss": 0.5, "tokens_per_second": 100.0, "step_time": 0.1})
print("ready", flush=True)
for line in sys.stdin:
    exec(line)
"""


@pytest.fixture
def trainer(run: RunWriter) -> Iterator[subprocess.Popen[str]]:
    run.close()
    command = [sys.executable, "-c", TRAINER, str(run.folder.path)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def wait_for(path: Path) -> None:
    end = time.monotonic() + 10
    while not path.exists() or not path.stat().st_size:
        assert time.monotonic() < end, f"{path} never came"
        os.sched_yield()


def test_a_living_run_is_seen_at_the_first_look(trainer: subprocess.Popen[str], folder: RunFolder) -> None:
    wait_for(folder.rank(1, 0).heartbeat)
    view = read_run(folder)
    assert (view.verdict.state, view.verdict.sure, view.is_live) == ("running", True, True)
    assert (view.step, view.loss, view.tokens_per_second, view.status.max_steps) == (3, 0.5, 100.0, 10)
    assert view.age is not None
    assert view.age < 5
    assert view.to_json().keys() >= {"id", "path", "state", "method", "model", "step", "max_steps", "loss", "age"}
    os.kill(trainer.pid, signal.SIGSTOP)
    beat = Heartbeat.from_json(read_json(folder.rank(1, 0).heartbeat))
    stopped = RunReader(folder, Limits(silent=0.0)).look()
    assert stopped.ranks[0].state == "silent"
    assert stopped.verdict.state == "running"
    assert beat.seq >= 1


def test_a_killed_run_is_lost_at_the_first_look(trainer: subprocess.Popen[str], folder: RunFolder) -> None:
    trainer.kill()
    trainer.wait()
    view = read_run(folder)
    assert (view.verdict.state, view.verdict.sure, view.is_live) == ("lost", True, False)
    assert [rank.state for rank in view.ranks] == ["lost"]
    RunWriter(folder).close()  # and can be taken over at once


@pytest.mark.fault("F45")
def test_an_ended_run_whose_pid_is_now_another_process_is_lost(folder: RunFolder, run: RunWriter) -> None:
    rank = RankWriter(folder, run.start_attempt("test"))
    rank.start()
    rank.close()
    run.set_status("running")
    run.close()
    beat, lease = read_json(rank.files.heartbeat) or {}, read_json(folder.node(0).lease) or {}
    child = Lease.from_json(lease).children[0]
    older = {"pid_start": float(str(beat["pid_start"])) - 1}
    write_json(rank.files.heartbeat, beat | older | {"phase": "train"})
    write_json(folder.node(0).lease, lease | older | {"children": [child | older | {"exit_code": None}]})
    assert read_run(folder).verdict.state == "lost"


@pytest.mark.fault("F41")
@pytest.mark.parametrize("skew", [-3600.0, 0.0, 3600.0])
def test_clock_skew_changes_no_verdict(
    skew: float, trainer: subprocess.Popen[str], folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader sits on another host whose clocks disagree; only what moves between its own looks counts."""
    wait_for(folder.rank(1, 0).heartbeat)
    os.kill(trainer.pid, signal.SIGSTOP)
    files = (folder.rank(1, 0).heartbeat, folder.node(0).lease)
    monkeypatch.setattr("lightning_hub.runs.reader.boot_id", lambda: "the reader's machine")
    monkeypatch.setattr("lightning_hub.runs.process_identity.boot_id", lambda: "the reader's machine")
    monkeypatch.setattr("socket.gethostname", lambda: "reader")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + skew)
    reader = RunReader(folder)

    def beat(path: Path, ahead: int) -> None:
        data = read_json(path) or {}
        write_json(path, data | {"seq": int(str(data["seq"])) + ahead})

    states = []
    for clock, move in ((0.0, (1, 1)), (5.0, (1, 1)), (30.0, (1, 0)), (55.0, (0, 0))):
        for path, ahead in zip(files, move, strict=True):
            beat(path, ahead)
        view = reader.look(now=1000.0 + clock)
        states.append((view.verdict.state, view.verdict.sure))
    assert states == [("running", False), ("running", True), ("orphan", True), ("lost", True)]
    assert (view.age or 0.0) >= 0.0


def test_a_failed_run_shows_its_first_error(folder: RunFolder, run: RunWriter) -> None:
    attempt = run.start_attempt("test", world_size=2)
    ranks = [RankWriter(folder, attempt, rank=number) for number in (1, 0)]
    for rank in ranks:
        rank.activity.step = 4
        try:
            raise ValueError(f"rank {rank.rank} broke")
        except ValueError as error:
            path = rank.record_error(error)
            write_json(path, (read_json(path) or {}) | {"time": f"2026-01-01T00:00:0{2 - rank.rank}Z"})
    run.set_status("failed", error=path, exit_code=1)
    run.close(1)
    first = first_error(folder)
    assert first is not None
    assert (first.rank, first.message, first.step, first.kind) == (1, "rank 1 broke", 4, "internal")
    assert "raise ValueError" in first.traceback
    assert read_run(folder).verdict.state == "failed"
    assert (read_json(folder.status) or {})["error"] == "attempts/1/rank0/error.json"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "oom"), (type("OutOfMemoryError", (RuntimeError,), {})(), "oom"), (OSError(28, "full"), "disk"),
        (FileNotFoundError(2, "x"), "internal"), (ConnectionResetError(), "comm"), (FloatingPointError(), "nan"),
        (type("DistBackendError", (RuntimeError,), {})(), "comm"), (KeyboardInterrupt(), "signal"),
        (KeyError(), "internal"),
    ],
)  # fmt: skip
def test_errors_have_a_class(error: BaseException, kind: str) -> None:
    assert classify(error) == kind


@pytest.mark.fault("F39")
@pytest.mark.parametrize("end", ["os._exit(1)", "os.kill(os.getpid(), 9)", "os.abort()"])
def test_every_line_before_a_sudden_end_is_in_the_log(
    end: str, trainer: subprocess.Popen[str], folder: RunFolder
) -> None:
    trainer.communicate(f"import os; [print('line', n) for n in range(10000)]; {end}\n")
    lines = folder.rank(1, 0).stdout.read_text().splitlines()
    assert lines == ["ready", *(f"line {n}" for n in range(10000))]
    if "abort" in end:
        assert "Fatal Python error: Aborted" in folder.rank(1, 0).stderr.read_text()


def test_stacks_are_written_on_request_and_the_run_continues(trainer: subprocess.Popen[str], folder: RunFolder) -> None:
    os.kill(trainer.pid, STACKS_SIGNAL)
    wait_for(folder.rank(1, 0).stacks)
    out, _ = trainer.communicate("print('still here')\n")
    assert out == "still here\n"
    assert "Current thread" in folder.rank(1, 0).stacks.read_text()


@pytest.mark.fault("F19")
def test_a_full_disk_stops_no_training_and_is_reported_once(
    folder: RunFolder, run: RunWriter, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rank = RankWriter(folder, run.start_attempt("test"), trouble=run.trouble)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for step in range(5):
            rank.log(step, {"loss": 1.0})
            run.event("x")
    run.set_status("running")
    rank.close()
    run.close()
    assert capfd.readouterr().err.count("No space left") == 1
    assert "No space left" in str((read_json(folder.status) or {})["warning"])


def test_a_heartbeat_is_small_whatever_is_in_it(tmp_path: Path) -> None:
    activity = RankActivity()
    activity.step = activity.epoch = 2**53
    activity.loss = -1.2345678901234567e-300
    for text in ("x" * 1000, "\u00e9" * 100, '"\\' * 100, "\n\x00\x1b" * 50, "\U0001f600" * 64, "\ud800"):
        activity.begin(text)
        data = HeartbeatFile(tmp_path / "h.json", activity).content()
        assert len(data) <= MAX_HEARTBEAT_BYTES
        assert len(str(json.loads(data)["doing"])) <= 64


def test_many_ranks_beat_more_slowly() -> None:
    assert (heartbeat_period(64), heartbeat_period(65)) == (2.0, 10.0)


@pytest.mark.security("S7")
def test_the_environment_is_recorded_by_an_allow_list(
    folder: RunFolder, run: RunWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "SOME_VARIABLE", "PATH_WITH_PASSWORD"):
        monkeypatch.setenv(name, "canary123")
    monkeypatch.setenv("MASTER_PORT", "29500")
    run.start_attempt("test")
    run.close()
    variables = (read_json(folder.node(0).env) or {})["variables"]
    assert isinstance(variables, dict)
    assert variables["MASTER_PORT"] == "29500"
    assert variables.keys() < os.environ.keys()
    assert [path for path in folder.path.rglob("*") if path.is_file() and b"canary123" in path.read_bytes()] == []


def test_the_inputs_of_the_user_are_kept_unchanged(folder: RunFolder, run: RunWriter) -> None:
    assert folder.config_input.read_text() == "# mine\na: 1\n"
    assert folder.config.read_text() == "model: {class_path: SFT}\n"
    run.close()
    assert input_text([("a.yaml", "a: 1"), ("b.yaml", "b: 2\n"), ("--trainer.max_epochs", "3")]) == (
        '# a.yaml\na: 1\n---\n# b.yaml\nb: 2\n# --trainer.max_epochs "3"\n'
    )


def test_requests_reach_the_training_loop_and_end_with_the_attempt(folder: RunFolder, run: RunWriter) -> None:
    rank = RankWriter(folder, run.start_attempt("test"))
    assert (rank.stop_requested(), rank.checkpoint_requested()) == (False, False)
    folder.control_stop.touch()
    folder.control_checkpoint.touch()
    assert (rank.stop_requested(), rank.checkpoint_requested(), rank.checkpoint_requested()) == (True, True, False)
    run.close()
    again = RunWriter(folder)
    assert again.start_attempt("resumed by hand", step=4) == 2
    assert not folder.control_stop.exists()
    again.close()


def test_a_second_attempt_continues_from_the_status(folder: RunFolder, run: RunWriter) -> None:
    run.start_attempt("first start")
    run.set_status("stopped", step=5, max_steps=10, exit_code=75)
    run.close(75)
    again = RunWriter(folder)
    again.start_attempt("resumed by hand", step=5, checkpoint=folder.checkpoint(5))
    assert (again.status.state, again.status.max_steps, again.status.exit_code) == ("starting", 10, None)
    again.close()
    events = [json.loads(line) for line in folder.events.read_text().splitlines()]
    assert [event["event"] for event in events] == ["created", "attempt", "state", "state", "attempt", "state"]
    assert events[4]["checkpoint"] == "step-5"


def test_the_shape_of_a_new_run() -> None:
    assert NewRun("a", "sft", "m", "x: 1\n").launcher == "fit"
