from __future__ import annotations

import fcntl
import json
import os
import re
import select
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_hub.checkpoints.storage import point_latest
from lightning_hub.errors import ConfigError
from lightning_hub.runs.files import LineFile, read_json, write_atomic, write_json
from lightning_hub.runs.folder import (
    RunFolder,
    create_run,
    find_run,
    list_runs,
    lock_run,
    open_run_dir,
    runs_root,
    unlock_run,
)
from lightning_hub.runs.process_identity import ProcessIdentity, boot_id
from lightning_hub.runs.rank_writer import RankWriter
from lightning_hub.runs.records import Heartbeat, RunInfo, Status, newer_schema
from lightning_hub.runs.writer import RunWriter


def test_names_follow_the_rule_and_are_never_used_twice(root: Path) -> None:
    made = [create_run("my-run.1", root) for _ in range(3)]
    assert len({run.id for run in made}) == 3
    assert all(re.fullmatch(r"my-run\.1-\d{8}-\d{6}(-\d+)?", run.id) for run in made)


@pytest.mark.parametrize("name", ["", "Upper", "-x", "../x", "a/b", "a b", "é", "x" * 65, "$(touch x)", "a\n"])
def test_other_names_are_refused(name: str, root: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a run"):
        create_run(name, root)
    assert not root.exists()


@pytest.mark.security("S11")
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o277])
def test_a_run_is_private_whatever_the_umask(umask: int, root: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom lightning_hub.runs.folder import create_run\n"
        "from tests.runs.conftest import NEW\nfrom lightning_hub.runs.writer import RunWriter\n"
        "from lightning_hub.runs.rank_writer import RankWriter\n"
        f"run = RunWriter.create(create_run('sft', Path({str(root)!r})), NEW)\n"
        "rank = RankWriter(run.folder, run.start_attempt('test')); rank.start(); print('x')\n"
        "rank.log(1, {'loss': 1.0}); rank.record_error(ValueError()); rank.close(); run.close()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, umask=umask, capture_output=True)
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in [root, *root.rglob("*")]}
    assert len(modes) > 15
    assert {path: oct(mode) for path, mode in modes.items() if mode != (0o700 if path.is_dir() else 0o600)} == {}


@pytest.mark.security("S11")
def test_symbolic_links_are_not_followed_when_writing(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("a.json", "b.jsonl"):
        (tmp_path / name).symlink_to(victim)
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(OSError, match="symbolic"):
        LineFile(tmp_path / "b.jsonl").append("x")
    (tmp_path / "latest").symlink_to(victim)
    point_latest(tmp_path / "step-1")
    assert victim.read_text() == "mine"
    assert (tmp_path / "latest").readlink() == Path("step-1")
    assert read_json(tmp_path / "a.json") == {"x": 1}


def test_a_failed_write_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "a.json", {"x": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "a.json", b"{}", fsync=True)
    assert read_json(tmp_path / "a.json") == {"x": 1}
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"a": 1'])
def test_a_file_without_a_json_object_reads_as_absent(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert read_json(tmp_path / "a.json") is None
    assert read_json(tmp_path / "absent.json") is None


def test_a_line_after_an_incomplete_one_is_separate(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"b":')
    file = LineFile(path)
    file.append('{"c": 3}')
    file.close()
    file.append('{"d": 4}')
    assert path.read_text().split("\n") == ['{"a": 1}', '{"b":', '{"c": 3}', '{"d": 4}', ""]


def test_exactly_this_folder(tmp_path: Path) -> None:
    assert open_run_dir(tmp_path / "new" / "run", resume=False).path.is_dir()
    (tmp_path / "new" / "run" / "x").touch()
    with pytest.raises(ConfigError, match="give --resume auto"):
        open_run_dir(tmp_path / "new" / "run", resume=False)
    assert open_run_dir(tmp_path / "new" / "run", resume=True).path == tmp_path / "new" / "run"
    with pytest.raises(ConfigError, match="cannot be made"):
        open_run_dir(tmp_path / "new" / "run" / "x" / "y", resume=False)


def test_runs_are_found_by_id_beginning_and_path(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sft-1", "sft-2", "sft-22", "osft-1"):
        write_json_folder(root / name)
    (root / "no-run").mkdir()
    assert [run.id for run in list_runs(root)] == ["osft-1", "sft-1", "sft-2", "sft-22"]
    assert find_run("sft-2", root).id == "sft-2"
    assert find_run("o", root).id == "osft-1"
    assert find_run(str(root / "sft-1"), Path("elsewhere")).id == "sft-1"
    for name, said in (("sft", "matches 3 runs"), ("x", "the newest is sft-22"), ("", "no run")):
        with pytest.raises(ConfigError, match=said):
            find_run(name, root)
    monkeypatch.setenv("LIGHTNING_HUB_RUNS", str(root))
    assert runs_root() == root
    assert runs_root("given") == Path("given")
    monkeypatch.delenv("LIGHTNING_HUB_RUNS")
    assert runs_root() == Path("runs")


def write_json_folder(path: Path) -> None:
    path.mkdir(parents=True)
    write_json(path / "run.json", {"schema": 1, "id": path.name})


HOLD = """
import sys, time
from pathlib import Path
from lightning_hub.runs.folder import RunFolder, lock_run
try:
    lock_run(RunFolder(Path(sys.argv[1])))
except Exception as error:
    print(error)
else:
    print("locked", flush=True)
    sys.stdin.read()
"""


def start(folder: RunFolder) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(folder.path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.fault("F42")
def test_of_two_starts_in_one_folder_one_is_refused(folder: RunFolder) -> None:
    both = [start(folder), start(folder)]
    said = [process.stdout.readline() for process in both if process.stdout]
    assert sorted(text == "locked\n" for text in said) == [False, True]
    owner = both[said.index("locked\n")]
    refusal = next(text for text in said if text != "locked\n")
    assert f"in use by process {owner.pid} on {os.uname().nodename}" in refusal
    owner.kill()
    for process in both:
        process.communicate()
    lock_run(folder)  # the owner is dead: its lock is taken over
    assert ProcessIdentity.from_json(read_json(folder.lock) or {}) == ProcessIdentity.own()
    unlock_run(folder)
    lock_run(folder)


@pytest.mark.fault("F42")
def test_two_starts_read_the_lock_one_after_the_other(folder: RunFolder) -> None:
    with folder.lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        other = start(folder)
        assert other.stdout is not None
        assert select.select([other.stdout], [], [], 0.5)[0] == []
    assert other.stdout.readline() == "locked\n"
    other.communicate()


@pytest.mark.fault("F45")
def test_a_lock_of_a_reused_pid_is_taken_over_and_that_of_another_host_is_not(folder: RunFolder) -> None:
    own = ProcessIdentity.own()
    write_json(folder.lock, own.to_json() | {"pid_start": own.start - 1})
    lock_run(folder)
    write_json(folder.lock, own.to_json() | {"boot_id": "before the reboot"})
    lock_run(folder)
    write_json(folder.lock, {**own.to_json(), "host": "other", "boot_id": "x"})
    with pytest.raises(ConfigError, match=f"on other.*remove {folder.lock}"):
        lock_run(folder)
    unlock_run(folder)
    assert (read_json(folder.lock) or {})["host"] == "other"


@pytest.mark.fault("F45")
def test_a_process_is_identified_by_more_than_its_pid() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = ProcessIdentity.of(child.pid)
    assert identity is not None
    assert identity.is_alive() is True
    assert ProcessIdentity.from_json(json.loads(json.dumps(identity.to_json()))) == identity
    assert ProcessIdentity(identity.pid, identity.start + 1, boot_id(), identity.host).is_alive() is False
    child.kill()
    while child.returncode is None and identity.is_alive():
        pass
    assert identity.is_alive() is False  # a zombie has ended, before anyone waits for it
    child.wait()
    assert ProcessIdentity.of(child.pid) is None


def test_records_ignore_unknown_keys() -> None:
    status = Status.from_json({"state": "dancing", "step": "3", "max_steps": 5, "new": 1})
    assert status == Status(max_steps=5)
    assert Status.from_json(None) == Status()
    beat = Heartbeat(seq=3, loss="NaN", mono=1.5, phase="save")
    assert Heartbeat.from_json(json.loads(json.dumps(beat.to_json()))) == beat
    assert newer_schema(RunInfo()) is None
    assert "newer version" in str(newer_schema(RunInfo.from_json({"schema": 2})))


def test_every_path_of_the_contract_has_one_name(run: RunWriter) -> None:
    rank = RankWriter(run.folder, run.start_attempt("test"))
    folder, files = run.folder, rank.files
    named = [
        folder.run_json, folder.config, folder.config_input, folder.plan, folder.status, folder.metrics, folder.samples,
        folder.data_report, folder.events, folder.latest, folder.checkpoint(7), folder.export, folder.control_stop,
        folder.control_checkpoint, folder.attempt_json(1),
        folder.node(0).env, folder.node(0).gauges, folder.node(0).lease,
        files.stdout, files.stderr, files.heartbeat, files.error, files.stacks,
    ]  # fmt: skip
    assert [str(path.relative_to(folder.path)) for path in named] == [
        "run.json", "config.yaml", "config.input.yaml", "plan.json", "status.json", "metrics.jsonl", "samples.jsonl",
        "data_report.json", "events.jsonl", "checkpoints/latest", "checkpoints/step-7", "export", "control/stop",
        "control/checkpoint", "attempts/1/attempt.json",
        "nodes/0/env.json", "nodes/0/gauges.json", "nodes/0/lease.json",
        "attempts/1/rank0/stdout.log", "attempts/1/rank0/stderr.log", "attempts/1/rank0/heartbeat.json",
        "attempts/1/rank0/error.json", "attempts/1/rank0/stacks.txt",
    ]  # fmt: skip
    run.close()
