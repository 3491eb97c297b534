"""`fit` over several processes: it starts its own ranks, or is one of those that somebody else has started."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from lightning_hub.cli import run
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.metrics import read_metrics
from lightning_hub.runs.process_identity import ProcessIdentity
from lightning_hub.runs.reader import read_run
from tests.conftest import PATIENCE, WriteRows
from tests.warm import Warm, after_step_3, hub

FLAGS = ("--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1", "--trainer.max_epochs", "2")
TWO = (*FLAGS, "--trainer.devices", "2")

Start = Callable[..., Warm]


@pytest.fixture
def recipe(tmp_path: Path, write_rows: WriteRows) -> list[str]:
    # fmt: off
    return [
        "--model", "SFT", "--model.model", "demo", "--model.learning_rate", "1e-3",
        "--data", "ChatData", "--data.train", str(write_rows(40)), "--data.val", "0.2", "--data.max_seq_len", "64",
        "--data.effective_batch_size", "8",
    ]
    # fmt: on


@pytest.fixture
def begin(recipe: list[str], tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a `fit` in a process of its own, in which something happens after step 3."""
    started = []

    def start(*flags: str, event: str = "None", folder: str = "run", env: dict[str, str] | None = None) -> Warm:
        command = hub("fit", *recipe, *flags, "--run-dir", str(tmp_path / folder))
        process = Warm(command, tmp_path, env=env, first=partial(after_step_3, event))
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


def resumed(folder: RunFolder) -> int:
    """Go on with a run and return the exit code."""
    return Warm(hub("runs", "resume", str(folder.path)), folder.path.parent).wait()


def losses(folder: RunFolder) -> list[tuple[object, object]]:
    return [(line["step"], line.get("loss", line.get("val_loss"))) for line in read_metrics(folder)]


def processes_of(folder: RunFolder) -> list[int]:
    """Return the living ranks of the run: those of its lease, and those that know of it by their environment."""
    lease = json.loads(folder.node(0).lease.read_text())
    machine = {"boot_id": lease["boot_id"], "host": lease["host"]}
    ranks = [ProcessIdentity.from_json({**child, **machine}) for child in lease["children"]]
    found = [rank.pid for rank in ranks if rank is not None and rank.is_alive() and not is_zombie(rank.pid)]
    for process in psutil.process_iter():
        try:
            if process.environ().get("LIGHTNING_HUB_RUN_DIR") == str(folder.path):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def is_zombie(pid: int) -> bool:
    """Say whether a process has ended, and nobody has asked how."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def assert_none_left(folder: RunFolder, limit: float = 30.0) -> None:
    end = time.monotonic() + limit
    while processes_of(folder) and time.monotonic() < end:
        os.sched_yield()
    assert not processes_of(folder)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_give_the_numbers_of_one_process(
    recipe: list[str], tmp_path: Path, strategy: str, begin: Start
) -> None:
    flags = (*TWO, "--trainer.strategy", strategy)
    if strategy == "ddp":  # from the command to the end with interpreters that are really started
        assert run(["fit", *recipe, *flags, "--run-dir", str(tmp_path / "run")]) == 0
    else:
        code, _, error = begin(*flags).finished()
        assert code == 0, error
    two = RunFolder(tmp_path / "run")
    assert run(["fit", *recipe, *FLAGS, "--run-dir", str(tmp_path / "one")]) == 0
    one = RunFolder(tmp_path / "one")
    assert len(losses(one)) == len(losses(two)) == 10
    for (step, loss), (other_step, other) in zip(losses(one), losses(two), strict=True):
        assert step == other_step
        assert float(str(loss)) == pytest.approx(float(str(other)), rel=1e-5)
    assert two.ranks(1) == [0, 1]
    assert json.loads(two.run_json.read_text())["nproc_per_node"] == 2
    assert "devices: 2" in two.config.read_text()
    lease = json.loads(two.node(0).lease.read_text())
    assert [child["exit_code"] for child in lease["children"]] == [0, 0]
    assert read_run(two).verdict.state == "finished"
    assert_none_left(two)


@pytest.mark.slow
@pytest.mark.fault("F1")
@pytest.mark.fault("F14")
@pytest.mark.fault("F30")
def test_a_killed_rank_ends_the_run_and_is_named(tmp_path: Path, begin: Start) -> None:
    kill = "os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGKILL)"
    code, _, error = begin(*TWO, "--checkpoint.every_n_steps", "1", event=kill).finished()
    folder = RunFolder(tmp_path / "run")
    assert code == 1
    assert "rank 1: killed by SIGKILL" in error
    record = json.loads(folder.rank(1, 1).error.read_text())
    assert (record["class"], record["rank"]) == ("signal", 1)
    assert json.loads(folder.status.read_text())["error"] == "attempts/1/rank1/error.json"
    assert_none_left(folder)
    assert resumed(folder) == 0
    assert json.loads(folder.status.read_text())["state"] == "finished"


@pytest.mark.slow
def test_the_first_error_and_its_exit_code_are_passed_on(tmp_path: Path, begin: Start) -> None:
    broken = "exec(\"if os.environ['RANK'] == '1': raise ValueError('broken on purpose')\")"
    code, _, error = begin(*TWO, event=broken).finished()
    assert code == 1
    assert "rank 1: broken on purpose" in error
    assert_none_left(RunFolder(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.fault("F6")
def test_ranks_die_with_their_supervisor(tmp_path: Path, begin: Start) -> None:
    folder = RunFolder(tmp_path / "run")
    process = begin(
        *TWO, "--trainer.max_epochs", "1000", event="open(os.environ['LIGHTNING_HUB_RUN_DIR'] + '/seen', 'w')"
    )
    wait_for(folder.path / "seen")
    process.kill()
    process.wait()
    assert_none_left(folder, 10)
    end = time.monotonic() + 5
    while read_run(folder).verdict.state != "lost":  # what was killed takes a moment to be gone
        assert time.monotonic() < end


def wait_for(path: Path, limit: float = PATIENCE) -> None:
    end = time.monotonic() + limit
    while not path.exists():
        assert time.monotonic() < end, f"{path} has not come"
        os.sched_yield()


ONE_RANK = "os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.{name})"
JOB = "os.environ['RANK'] == '0' and os.kill(os.getppid(), signal.{name})"


@pytest.mark.slow
@pytest.mark.fault("F25")
@pytest.mark.parametrize(
    ("event", "state"),
    [
        (ONE_RANK.format(name="SIGTERM"), "preempted"),
        (JOB.format(name="SIGTERM"), "preempted"),
        (JOB.format(name="SIGINT"), "stopped"),
        ("os.environ['RANK'] == '0' and self.run.folder.control_stop.touch()", "stopped"),
    ],
    ids=["one rank", "job", "ctrl-c", "wish"],
)
def test_a_stop_is_agreed_on(tmp_path: Path, begin: Start, event: str, state: str) -> None:
    code, _, error = begin(*TWO, event=event).finished()
    folder = RunFolder(tmp_path / "run")
    assert code == 75, error
    status = json.loads(folder.status.read_text())
    assert (status["state"], status["exit_code"]) == (state, 75)
    assert status["step"] in (3, 4), "a signal to the supervisor takes a moment to get to the ranks"
    assert (folder.checkpoints / f"step-{status['step']}").is_dir()
    assert_none_left(folder)


@pytest.mark.slow
@pytest.mark.fault("F27")
def test_a_second_interrupt_ends_all_ranks_at_once(tmp_path: Path, begin: Start) -> None:
    interrupt = "os.kill(os.getppid(), signal.SIGINT)"
    twice = f"os.environ['RANK'] == '0' and [{interrupt}, __import__('time').sleep(0.3), {interrupt}]"
    code, _, error = begin(*TWO, event=twice).finished()
    assert code == 130, error
    assert_none_left(RunFolder(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.fault("F26")
def test_a_time_limit_of_slurm_leads_to_a_checkpoint_and_one_requeue(tmp_path: Path, begin: Start) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    scontrol = tools / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    scontrol.chmod(0o700)
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711"}
    code, _, error = begin(*TWO, event=JOB.format(name="SIGUSR1"), env=env).finished()
    folder = RunFolder(tmp_path / "run")
    assert code == 75, error
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    assert json.loads(folder.status.read_text())["state"] == "preempted"
    assert resumed(folder) == 0


@pytest.mark.slow
@pytest.mark.fault("F33")
def test_a_step_that_takes_all_memory_is_described(tmp_path: Path, begin: Start) -> None:
    too_much = "os.environ['RANK'] == '1' and __import__('torch').empty(1 << 55)"
    code, _, error = begin(*TWO, event=too_much).finished()
    folder = RunFolder(tmp_path / "run")
    assert code == 1
    assert "rank 1: no memory was left in step 4, whose packed rows on this rank have" in error
    assert json.loads(folder.rank(1, 1).error.read_text())["class"] == "oom"


POISON = "os.environ.get('RANK', '1') == '1' and setattr(module, 'row_loss', {poison})"
ALWAYS = "lambda row, step: type(module).row_loss(module, row, step) * float('inf')"
ONCE = "lambda row, step: (module.__dict__.pop('row_loss'), type(module).row_loss(module, row, step) * float('nan'))[1]"


@pytest.mark.slow
@pytest.mark.fault("F32")
@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp"])
def test_a_loss_that_is_no_number_on_one_rank_stops_all(tmp_path: Path, begin: Start, strategy: str) -> None:
    flags = FLAGS if strategy == "auto" else (*TWO, "--trainer.strategy", strategy)
    code, _, error = begin(*flags, "--checkpoint.every_n_steps", "1", event=POISON.format(poison=ALWAYS)).finished()
    folder = RunFolder(tmp_path / "run")
    assert code == 1
    assert "step 4 has loss" in error
    assert {json.loads(folder.rank(1, rank).error.read_text())["class"] for rank in folder.ranks(1)} == {"nan"}
    events = [json.loads(line) for line in folder.events.read_text().splitlines()]
    (told,) = [event for event in events if event["event"] == "not finite"]
    assert told["step"] == 4
    assert len(told["samples"]) == 8
    assert folder.latest.resolve().name == "step-3"


@pytest.mark.slow
@pytest.mark.fault("F32")
def test_a_step_may_be_left_out(tmp_path: Path, begin: Start) -> None:
    event = POISON.format(poison=ONCE)
    code, _, error = begin(*TWO, "--model.on_nan", "skip:1", "--trainer.max_steps", "6", event=event).finished()
    folder = RunFolder(tmp_path / "run")
    assert code == 0, error
    lines = {line["step"]: line for line in read_metrics(folder) if "loss" in line}
    assert lines[4]["loss"] == "NaN"
    assert 0 < float(str(lines[5]["loss"])) < float(str(lines[1]["loss"]))
    assert any(json.loads(line)["event"] == "skipped" for line in folder.events.read_text().splitlines())


@pytest.mark.slow
def test_under_torchrun_it_is_one_of_the_ranks(recipe: list[str], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "lightning_hub", "fit", *recipe, *FLAGS, "--run-dir", str(folder.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("steps  ") == 1, "only rank 0 speaks"
    assert json.loads(folder.run_json.read_text())["nproc_per_node"] == 2
    assert len(losses(folder)) == 10
    assert folder.ranks(1) == [0, 1]


@pytest.mark.slow
@pytest.mark.fault("F5")
def test_ranks_die_with_the_agent_of_torchrun(recipe: list[str], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = [*FLAGS, "--trainer.max_epochs", "1000", "--run-dir", str(folder.path)]
    with subprocess.Popen([*torchrun, "-m", "lightning_hub", "fit", *recipe, *flags]) as agent:
        wait_for(folder.metrics)
        ranks = psutil.Process(agent.pid).children(recursive=True)
        agent.kill()
    assert len(ranks) >= 2
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not alive


@pytest.mark.slow
def test_ranks_started_by_variables(recipe: list[str], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    command = hub("fit", *recipe, *TWO, "--run-dir", str(folder.path))
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29617"}
    ranks = [Warm(command, tmp_path, env={**common, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    for process in ranks:
        code, _, error = process.finished()
        assert code == 0, error
    assert len(losses(folder)) == 10


@pytest.mark.fault("F16")
def test_a_world_that_contradicts_the_recipe(
    recipe: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert run(["fit", *recipe, *TWO, "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "1 x 2 = 2 processes, torchrun started 1 x 4 = 4" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.fault("F3")
def test_a_frozen_rank_is_told_and_can_be_ended(
    tmp_path: Path, begin: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run")
    process = begin(*TWO, "--trainer.max_epochs", "100000")
    wait_for(folder.metrics)
    end = time.monotonic() + 30
    while not (beat := json.loads(folder.rank(1, 1).heartbeat.read_text()))["doing"]:
        assert time.monotonic() < end
        time.sleep(0.02)
    rank = psutil.Process(beat["pid"])
    rank.suspend()
    line, heard = process.wait_for_error("rank 1 has given no sign of life for 1", PATIENCE)
    assert f"; its process is stopped, kill -CONT {rank.pid} continues it; see lightning-hub runs show run" in line
    assert re.search(r"is at step \d+, in \w+", line)
    rank.resume()
    _, heard = process.wait_for_error("note: rank 1 gives signs of life again after 1", PATIENCE, heard)
    assert "rank 1 has given no sign" in folder.rank(1, 0).stderr.read_text()
    events = [json.loads(line) for line in folder.events.read_text().splitlines()]
    assert [(event["event"], event["rank"]) for event in events if "rank" in event] == [
        ("silent", 1),
        ("heard again", 1),
    ]
    rank.suspend()
    process.wait_for_error("rank 1 has given no sign of life for 1", PATIENCE, heard)
    assert run(["runs", "stop", str(folder.path)]) == 0
    out = capsys.readouterr().out
    assert "rank 1 is silent for 1" in out
    assert "lightning-hub runs stop run --now ends the run at once" in out
    assert run(["runs", "stop", str(folder.path), "--now"]) == 0
    assert process.wait(10) == 130
    status = json.loads(folder.status.read_text())
    assert (status["state"], status["reason"]) == ("failed", "stopped at once; the newest checkpoint is untouched")
    assert_none_left(folder)


@pytest.mark.slow
def test_a_frozen_process_that_is_alone_can_be_ended(tmp_path: Path, begin: Start) -> None:
    folder = RunFolder(tmp_path / "run")
    process = begin(*FLAGS, "--trainer.max_epochs", "100000", "--trainer.devices", "1")
    wait_for(folder.metrics)
    psutil.Process(process.pid).suspend()
    assert run(["runs", "stop", str(folder.path), "--now"]) == 0
    assert process.wait(10) == -9
    assert read_run(folder).verdict.state == "failed"
    assert json.loads(folder.status.read_text())["exit_code"] == 130
    step = json.loads(folder.status.read_text())["step"]
    assert step >= 1
