"""The proofs pass on this code, and each fails when what it proves is broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from lightning_hub.cli import run
from lightning_hub.commands import doctor
from lightning_hub.doctor import proofs
from lightning_hub.doctor.children import Child, ChildrenFailedError, run_children
from lightning_hub.doctor.findings import equality
from tests.doctor.faulty import FAULTS
from tests.warm import Warm, hub


@pytest.fixture(autouse=True)
def _fit_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine looks like is another test's matter."""
    monkeypatch.setattr(doctor, "check_machine", lambda runs: [])


def proved(folder: Path, fault: str, *names: str) -> tuple[int, dict[str, bool]]:
    """Return the exit code and which checks are ok, where every process has a fault."""
    env = {"LIGHTNING_HUB_CACHE": str(folder / "cache")}  # what is found about a faulty program is not kept
    first = partial(without_examination, FAULTS[fault])
    code, said, error = Warm(hub("doctor", "--json", "--proof", *names), folder, env=env, first=first).finished()
    assert code in (0, 1), error
    return code, checks(said)


def without_examination(fault: Callable[[], None]) -> None:
    looking: Any = doctor
    looking.check_machine = lambda runs: []
    fault()


def checks(said: str) -> dict[str, bool]:
    findings = json.loads(said)
    for finding in findings:
        print(finding)  # shown when the test fails
        assert set(finding) == {"check", "ok", "detail", "remedy"}
        assert (finding["remedy"] is None) is finding["ok"]
    return {finding["check"]: finding["ok"] for finding in findings}


@pytest.mark.slow
def test_all_five_equalities_hold(tmp_path: Path) -> None:
    code, found = proved(tmp_path, "none")
    assert code == 0
    assert {check.partition(":")[0] for check in found} == set(proofs.PROOFS.values())
    ranks = [check for check in found if check.startswith("2 ranks")]
    assert [check.partition(": ")[2] for check in ranks] == ["ddp", "fsdp", "model_parallel, tp 2"]


@pytest.mark.slow
def test_a_proof_holds_in_a_new_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json", "--proof", "exported"]) == 0
    assert checks(capsys.readouterr().out) == {"exported = trained": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "proof", "fails"),
    [
        ("leak", "packed", {"packed = unpacked: one forward"}),
        ("leak_after_the_proof", "packed", {f"packed = unpacked: {what}" for what in ("logits", "gradients")}),
        ("mean_of_means", "accumulated", {f"accumulated = one batch: {what}" for what in ("loss", "gradients")}),
        ("world_forgotten", "ranks", {"2 ranks = 1 rank: ddp", "2 ranks = 1 rank: fsdp"}),
        ("rank_dies", "ranks", {"2 ranks = 1 rank"}),
        ("altered_checkpoint", "resumed", {f"resumed = straight: {what}" for what in ("losses", "weights")}),
        ("random_state_lost", "resumed", {f"resumed = straight: {what}" for what in ("losses", "weights")}),
        ("altered_export", "exported", {"exported = trained"}),
    ],
)
def test_each_proof_fails_when_what_it_proves_is_broken(
    fault: str,
    proof: str,
    fails: set[str],
    tmp_path: Path,
) -> None:
    code, found = proved(tmp_path, fault, proof)
    assert code == 1
    assert {check for check, ok in found.items() if not ok} == fails


def test_nan_is_not_an_equality() -> None:
    assert not equality("a = b", float("nan"), 1.0, "anything").ok
    assert equality("a = b", 0.0, 0.0, "anything").ok
    assert not equality("a = b", 1e-30, 0.0, "anything").ok


def child(name: str, code: str, tmp_path: Path) -> Child:
    (tmp_path / f"{name}_child.py").write_text(code)
    return Child(name, (f"{name}_child",), {"PYTHONPATH": str(tmp_path)})


def test_an_error_of_a_child_is_shown_and_none_is_left(tmp_path: Path) -> None:
    before = psutil.Process().children(recursive=True)  # other tests of this process may keep some
    good = child("good", "import time; time.sleep(60)", tmp_path)
    bad = child("bad", "raise SystemExit('no gloo here')", tmp_path)
    with pytest.raises(ChildrenFailedError, match="bad: no gloo here"):
        run_children([good, bad], tmp_path)
    assert psutil.Process().children(recursive=True) == before


def test_a_child_that_hangs_is_ended(tmp_path: Path) -> None:
    before = psutil.Process().children(recursive=True)
    with pytest.raises(ChildrenFailedError, match="hangs did not end within 1 s"):
        run_children([child("hangs", "import time; time.sleep(60)", tmp_path)], tmp_path, limit=1)
    assert psutil.Process().children(recursive=True) == before


def test_children_do_not_get_the_variables_of_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    said = f"import os, pathlib; pathlib.Path({str(tmp_path / 'said')!r}).write_text(str(dict(os.environ)))"
    run_children([child("says", said, tmp_path)], tmp_path)
    assert "WORLD_SIZE" not in (tmp_path / "said").read_text()
    assert "SLURM" not in (tmp_path / "said").read_text()
