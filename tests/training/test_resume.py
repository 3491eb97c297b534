"""A stopped run goes on as if it had never stopped, bit for bit."""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_hub.cli import run
from lightning_hub.data import prepare
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.manifest import list_checkpoints, verify
from lightning_hub.runs.metrics import Line, read_metrics
from tests.conftest import WriteRows
from tests.training.conftest import Fit
from tests.warm import Warm, after_step_3, hub, warm_run

# Noise on the embeddings and a validation in mid-epoch: random states and every kind of boundary are in it.
LONG = ("--trainer.max_epochs", "3", "--trainer.val_check_interval", "2", "--model.neftune_alpha", "5")
EVERY_STEP = ("--checkpoint.every_n_steps", "1", "--checkpoint.keep", "99")


def losses(folder: RunFolder) -> list[tuple[object, object, object]]:
    kept: list[Line] = read_metrics(folder)
    return [(line["step"], line.get("loss"), line.get("val_loss")) for line in kept]


def assert_same_end(straight: RunFolder, resumed: RunFolder) -> None:
    assert losses(resumed) == losses(straight)
    ours, theirs = (load_file(folder.export / "model.safetensors") for folder in (resumed, straight))
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


def cut_after(folder: RunFolder, step: int, to: Path) -> RunFolder:
    """Copy a run as it was when its checkpoint of ``step`` was the newest."""
    shutil.copytree(folder.path, to, symlinks=True)
    cut = RunFolder(to)
    for later, path in list_checkpoints(cut.checkpoints):
        if later > step:
            shutil.rmtree(path)
    cut.latest.unlink()
    shutil.rmtree(cut.export)
    return cut


@pytest.mark.slow
@pytest.mark.fault("F22")
@pytest.mark.parametrize(
    ("workers", "stops"),
    [("0", (1, 2, 3, 4, 6, 8, 11)), ("2", (3, 8))],  # within an epoch, before and after a validation, at ends of epochs
)
def test_resume_from_every_step_is_exact(fit: Fit, tmp_path: Path, workers: str, stops: tuple[int, ...]) -> None:
    code, straight = fit(*LONG, *EVERY_STEP, "--data.num_workers", workers)
    assert code == 0
    steps = [step for step, _ in list_checkpoints(straight.checkpoints)]
    assert steps == list(range(12, 0, -1))
    for step in stops:
        resumed = cut_after(straight, step, tmp_path / f"from-{step}")
        assert run(["runs", "resume", str(resumed.path)]) == 0
        assert_same_end(straight, resumed)


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "steps"), [("1", (3, 4, 9)), ("2", (4,))])  # more of two: tests/parallel
def test_osft_goes_on_exactly(fit: Fit, tmp_path: Path, devices: str, steps: tuple[int, ...]) -> None:
    shape = ("--trainer.accelerator", "cpu", "--trainer.devices", devices, "--trainer.strategy", "fsdp")
    command = run if devices == "1" else partial(warm_run, tmp_path)
    options = (*LONG, *EVERY_STEP, *shape, "--model.unfreeze_rank_ratio", "0.3")
    code, straight = fit(*options, method="OSFT", command=command)
    assert code == 0
    for step in steps:
        resumed = cut_after(straight, step, tmp_path / f"from-{step}")
        assert command(["runs", "resume", str(resumed.path)]) == 0
        assert_same_end(straight, resumed)


@pytest.mark.slow
def test_a_finished_run_is_extended(fit: Fit) -> None:
    _, folder = fit("--trainer.max_epochs", "1", "--model.lr_scheduler", "constant")
    _, longer = fit("--trainer.max_epochs", "2", "--model.lr_scheduler", "constant", folder="longer")
    assert run(["runs", "resume", str(folder.path), "--trainer.max_epochs", "2"]) == 0
    assert_same_end(longer, folder)


@pytest.mark.fault("F21")
def test_must_never_begins_again(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, folder = fit("--resume", "must")
    assert code == 4
    assert "no checkpoint" in capsys.readouterr().err
    assert not folder.metrics.exists() or not read_metrics(folder)
    code, folder = fit("--resume", "auto", "--trainer.max_steps", "1", folder="fresh")
    assert code == 0
    assert json.loads(folder.attempt_json(1).read_text())["reason"] == "first start"


@pytest.mark.slow
def test_damaged_checkpoints_are_passed_over(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = fit(*EVERY_STEP, "--trainer.max_steps", "3")
    (folder.checkpoint(3) / "state.pt").write_bytes(b"")
    shutil.rmtree(folder.export)
    assert run(["runs", "resume", str(folder.path)]) == 0
    assert "state.pt has 0 bytes" in capsys.readouterr().err
    assert json.loads(folder.attempt_json(2).read_text())["checkpoint"] == "step-2"
    assert verify(folder.latest.resolve()).step == 3, "the damaged one was replaced"
    for _, path in list_checkpoints(folder.checkpoints):
        (path / "weights.safetensors").unlink()
    assert run(["runs", "resume", str(folder.path)]) == 4


@pytest.mark.slow
def test_going_on_from_an_older_checkpoint_gives_up_the_newer_ones(fit: Fit) -> None:
    _, folder = fit(*EVERY_STEP, "--trainer.max_steps", "4")
    older = ["--resume", str(folder.checkpoint(1)), "--checkpoint.keep", "2", "--trainer.max_steps", "2"]
    assert run(["fit", "--config", str(folder.config), "--run-dir", str(folder.path), *older]) == 0
    assert [step for step, _ in list_checkpoints(folder.checkpoints)] == [2, 1]
    assert verify(folder.latest.resolve()).step == 2


@pytest.mark.slow
@pytest.mark.fault("F24")
def test_changed_data_is_refused_unless_allowed(
    fit: Fit, write_rows: WriteRows, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = fit(*EVERY_STEP, "--trainer.max_steps", "3")
    write_rows(41)
    again = ["runs", "resume", str(folder.path), "--trainer.max_steps", "5", "--data.effective_batch_size", "16"]
    assert run(again) == 2
    error = capsys.readouterr().err
    assert "changed since the checkpoint: the hash of the training samples was " in error
    assert "; data.init_args.effective_batch_size was 8 and is 16; " in error
    assert "pass --allow-changed-data" in error
    assert json.loads(folder.status.read_text())["state"] == "failed"
    assert run([*again, "--allow-changed-data"]) == 0
    assert "note: data.init_args.effective_batch_size was 8 and is 16 since the checkpoint" in capsys.readouterr().err
    assert verify(folder.latest.resolve()).step == 5
    epochs = [line["epoch"] for line in read_metrics(folder) if "loss" in line]
    assert epochs == [0, 0, 0, 1, 1], "where epochs have 2 steps, one with 3 finished is over"


def test_moved_data_is_resumed_without_a_note(
    fit: Fit, write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = fit(*EVERY_STEP, "--trainer.max_steps", "2")
    moved = tmp_path / "elsewhere" / "renamed.jsonl"
    moved.parent.mkdir()
    (tmp_path / "rows.jsonl").rename(moved)
    capsys.readouterr()
    assert run(["runs", "resume", str(folder.path), "--trainer.max_steps", "3", "--data.train", str(moved)]) == 0
    error = capsys.readouterr().err
    assert "since the checkpoint" not in error
    assert "could not be compared" not in error


def test_samples_of_another_version_of_the_code_are_compared_by_their_content(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = fit(*EVERY_STEP, "--trainer.max_steps", "2")
    entries = Path(os.environ["LIGHTNING_HUB_CACHE"]) / "data"
    before = set(entries.iterdir())
    monkeypatch.setattr(prepare, "code_version", lambda: "a later version")
    assert run(["runs", "resume", str(folder.path), "--trainer.max_steps", "3"]) == 0
    assert set(entries.iterdir()) > before, "the samples were made again"


@pytest.mark.slow
@pytest.mark.fault("F24")
def test_other_changes_are_named_and_take_effect(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    constant = ("--model.lr_scheduler", "constant", *EVERY_STEP)
    _, folder = fit(*constant, "--trainer.max_steps", "2")
    capsys.readouterr()
    changes = ["--model.learning_rate", "5e-4", "--trainer.gradient_clip_val", "0.5", "--seed_everything", "7"]
    assert run(["runs", "resume", str(folder.path), "--trainer.max_steps", "3", *changes]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.endswith("since the checkpoint")]
    assert notes == [
        "note: seed_everything was 42 and is 7 since the checkpoint",
        "note: trainer.gradient_clip_val was None and is 0.5 since the checkpoint",
        "note: model.init_args.learning_rate was 0.001 and is 0.0005 since the checkpoint",
    ]
    assert [line["lr"] for line in read_metrics(folder)] == [1e-3, 1e-3, 5e-4]


LASTING = {  # a method, options of the first run, a change that would fit the tensors or not, and the key it names
    "rank": ("LoRA", (), ("--model.r", "8"), "r"),
    "strength": ("LoRA", (), ("--model.alpha", "8"), "alpha"),
    "targets": ("LoRA", (), ("--model.targets", "q_proj"), "targets"),
    "a start in the weights": ("LoRA", (), ("--model.init", "pissa"), "init"),
    "no start in the weights": ("LoRA", ("--model.init", "olora"), ("--model.init", "default"), "init"),
    "ratio": ("OSFT", (), ("--model.unfreeze_rank_ratio", "0.5"), "unfreeze_rank_ratio"),
    "mean ratio": (
        "OSFT",
        ("--model.ranks", "adaptive"),
        ("--model.unfreeze_rank_ratio", "0.5"),
        "unfreeze_rank_ratio",
    ),
    "form": ("OSFT", (), ("--model.parametrization", "usv"), "parametrization"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LASTING)
def test_what_is_trained_stays_what_it_is(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setenv("LIGHTNING_HUB_CACHE", str(tmp_path / "cache"))
    method, begun, change, name = LASTING[case]
    code, folder = fit("--trainer.max_steps", "1", *begun, method=method)
    assert code == 0
    before = folder.latest.resolve()
    capsys.readouterr()
    assert run(["runs", "resume", str(folder.path), "--trainer.max_steps", "2", *change]) == 2
    error = capsys.readouterr().err
    assert f"error: model.init_args.{name}: it was " in error
    assert "or start a new run" in error
    assert folder.latest.resolve() == before
    assert run(["runs", "resume", str(folder.path), "--trainer.max_steps", "2"]) == 0


@pytest.mark.slow
def test_a_run_goes_on_protecting_what_it_began_with(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_HUB_CACHE", str(tmp_path / "cache"))
    _, first = fit("--trainer.max_steps", "1", method="OSFT")
    task = ("--model.model", str(first.export), "--model.unfreeze_rank_ratio", "0.5")
    previous = ("--model.previous", f"[{first.export}]")
    _, second = fit("--trainer.max_steps", "1", *task, *previous, method="OSFT", folder="second")
    more = ("--trainer.max_steps", "2")
    assert run(["runs", "resume", str(second.path), *more, "--model.previous", f"[{second.export}]"]) == 2
    assert "model.init_args.previous: the checkpoint was made with other files" in capsys.readouterr().err
    moved = shutil.copytree(first.export, tmp_path / "moved")
    assert run(["runs", "resume", str(second.path), *more, "--model.previous", f"[{moved}]"]) == 0


@pytest.mark.slow
@pytest.mark.security("S1")
@pytest.mark.parametrize("name", ["address", "file", "no manifest"])
def test_what_is_no_checkpoint_of_ours_is_refused(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    _, folder = fit(*EVERY_STEP, "--trainer.max_steps", "1")
    foreign = shutil.copytree(folder.checkpoint(1), tmp_path / "foreign")
    (foreign / "manifest.json").unlink()
    (foreign / ".metadata").write_bytes(b"never opened")
    path, sentence = {
        "address": ("https://example.com/step-1", "is a URL"),
        "file": (str(foreign / "state.pt"), "is not a checkpoint folder"),
        "no manifest": (str(foreign), "pass --trust-checkpoint"),
    }[name]
    code, _ = fit("--resume", path, "--trainer.max_steps", "2", folder="second")
    assert code == 2
    assert sentence in capsys.readouterr().err
    if name == "no manifest":
        assert fit("--resume", path, "--trust-checkpoint", "--trainer.max_steps", "2", folder="third")[0] == 0


def fit_until(event: str, straight: RunFolder, to: Path) -> tuple[int, RunFolder, str]:
    """Repeat a run in a process of its own in which ``event`` happens after step 3."""
    command = hub("fit", "--config", str(straight.config), "--run-dir", str(to))
    code, _, error = Warm(command, to.parent, first=partial(after_step_3, event)).finished()
    return code, RunFolder(to), error


@pytest.mark.slow
@pytest.mark.fault("F25")
@pytest.mark.parametrize(
    ("event", "state"),
    [
        ("os.kill(os.getpid(), signal.SIGTERM)", "preempted"),
        ("os.kill(os.getpid(), signal.SIGINT)", "stopped"),
        ("self.run.folder.control_stop.touch()", "stopped"),
    ],
)
def test_a_stop_saves_and_the_run_goes_on(fit: Fit, tmp_path: Path, event: str, state: str) -> None:
    _, straight = fit(*LONG)
    code, folder, error = fit_until(event, straight, tmp_path / "stopped")
    assert code == 75, error
    status = json.loads(folder.status.read_text())
    assert (status["state"], status["step"], status["exit_code"]) == (state, 3, 75)
    assert "Traceback" not in error
    assert run(["runs", "resume", str(folder.path)]) == 0
    assert_same_end(straight, folder)


@pytest.mark.slow
@pytest.mark.fault("F27")
def test_a_second_interrupt_stops_at_once(fit: Fit, tmp_path: Path) -> None:
    _, straight = fit(*LONG)
    event = "[os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]"
    code, folder, error = fit_until(event, straight, tmp_path / "stopped")
    assert code == 130, error
    assert json.loads(folder.status.read_text())["state"] == "failed"


@pytest.mark.slow
def test_a_killed_run_goes_on_at_once(fit: Fit, tmp_path: Path) -> None:
    _, straight = fit(*LONG, *EVERY_STEP)
    code, folder, _ = fit_until("os.kill(os.getpid(), signal.SIGKILL)", straight, tmp_path / "killed")
    assert code == -signal.SIGKILL
    assert json.loads(folder.status.read_text())["state"] == "running"
    assert run(["runs", "resume", str(folder.path)]) == 0
    assert_same_end(straight, folder)


@pytest.mark.slow
def test_a_wish_for_a_checkpoint(fit: Fit, tmp_path: Path) -> None:
    _, straight = fit(*LONG)
    code, folder, error = fit_until("self.run.folder.control_checkpoint.touch()", straight, tmp_path / "saved")
    assert code == 0, error
    events = [json.loads(line) for line in folder.events.read_text().splitlines()]
    assert not folder.control_checkpoint.exists()
    assert any(event["event"] == "checkpoint" and event["step"] == 3 for event in events)


def on_a_small_disk(checkpoints: Path) -> None:
    """Let this process have a disk for checkpoints with room for one and not for two."""
    checkpoints.mkdir(parents=True)
    assert ctypes.CDLL(None).unshare(0x00020000) == 0  # CLONE_NEWNS: no other process sees what is mounted
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(checkpoints)], check=True)
    atexit.register(lambda: print("left", sorted(path.name for path in checkpoints.iterdir()), file=sys.stderr))


@pytest.mark.slow
@pytest.mark.fault("F18")
def test_a_full_disk_ends_the_run_and_leaves_the_old_checkpoint(fit: Fit, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    _, straight = fit("--trainer.max_steps", "2")
    folder = RunFolder(tmp_path / "full")
    arguments = [
        "fit",
        "--config",
        str(straight.config),
        "--run-dir",
        str(folder.path),
        "--resume",
        "auto",
        *EVERY_STEP,
    ]
    first = partial(on_a_small_disk, folder.checkpoints)
    code, _, error = Warm(hub(*arguments), tmp_path, first=first).finished()
    assert code == 1
    assert "left ['latest', 'step-1']" in error
    assert "are needed and" in error
    assert "free space and resume" in error
    assert json.loads(folder.status.read_text())["state"] == "failed"
    record = json.loads((folder.path / json.loads(folder.status.read_text())["error"]).read_text())
    assert record["class"] == "disk"


CONSTANT = ("--trainer.max_epochs", "1", "--model.lr_scheduler", "constant")


def said_of_resume(folder: RunFolder, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    capsys.readouterr()
    return run(["runs", "resume", str(folder.path), *flags]), capsys.readouterr().err


def state_of(folder: RunFolder) -> object:
    return json.loads(folder.status.read_text())["state"]


@pytest.mark.slow
def test_a_finished_run_stays_finished_and_remembers_its_extension(
    fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = fit(*CONSTANT)
    code, said = said_of_resume(folder, capsys)
    assert (code, state_of(folder), folder.attempts()) == (2, "finished", [1])
    assert said == (
        "error: RUN: run is finished, after 1 epoch (4 steps); to train on, give a limit beyond that: "
        "lightning-hub runs resume run --trainer.max_epochs 2\n"
    )
    assert said_of_resume(folder, capsys, "--trainer.max_epochs", "3", "--model.learning_rate", "5e-4")[0] == 0
    for flags in ((), ("--trainer.max_epochs", "2"), ("--trainer.max_steps", "5"), ("--model.weight_decay", "0.1")):
        code, said = said_of_resume(folder, capsys, *flags)
        assert (code, state_of(folder), folder.attempts()) == (2, "finished", [1, 2]), flags
        assert "run is finished, after 3 epochs (12 steps)" in said
        assert said.count("\n") == 1
    shutil.rmtree(folder.checkpoint(12))
    assert said_of_resume(folder, capsys)[0] == 0, "what is lost is trained again, as the extension said"
    assert [line["lr"] for line in read_metrics(folder) if "lr" in line] == [1e-3] * 4 + [5e-4] * 8
    assert json.loads(folder.status.read_text())["step"] == 12


@pytest.mark.slow
def test_an_attempt_that_was_refused_is_not_remembered(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = fit(*CONSTANT, *EVERY_STEP)
    refused = ("--trainer.max_epochs", "2", "--data.effective_batch_size", "16")
    assert said_of_resume(folder, capsys, *refused)[0] == 2
    shutil.rmtree(folder.checkpoint(4))
    assert said_of_resume(folder, capsys)[0] == 0
    assert json.loads(folder.status.read_text())["step"] == 4


@pytest.mark.slow
def test_limits_before_the_checkpoint_are_refused_in_one_sentence(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = fit("--trainer.max_epochs", "3")
    status = json.loads(folder.status.read_text())
    folder.status.write_text(json.dumps(status | {"state": "stopped"}))
    code, said = said_of_resume(folder, capsys, "--trainer.max_epochs", "1")
    assert code == 2
    assert "trainer.max_epochs: 1 is before the checkpoint, which has finished " in said
    assert "Traceback" not in said
    steps = ("--trainer.max_steps", "12")
    assert said_of_resume(folder, capsys, *steps)[0] == 0, "there is nothing to do but to export"
    assert state_of(folder) == "finished"
