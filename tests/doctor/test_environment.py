"""Each check of the environment says what is wrong and what to do."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
from collections import namedtuple
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from lightning_hub.cli import run
from lightning_hub.doctor import environment
from lightning_hub.doctor.environment import check_machine
from lightning_hub.doctor.findings import Finding

Usage = namedtuple("Usage", "total used free")
Breaks = Callable[[pytest.MonkeyPatch], None]


def found(tmp_path: Path) -> dict[str, Finding]:
    return {finding.check: finding for finding in check_machine(tmp_path / "runs")}


def version(name: str, given: str) -> Breaks:
    """Return what makes a package appear in another version."""
    real = metadata.version
    return lambda patch: patch.setattr(metadata, "version", lambda asked: given if asked == name else real(asked))


def put(target: Any, name: str, value: object) -> Breaks:
    return lambda patch: patch.setattr(target, name, value)


def no_network(*_: object, **__: object) -> None:
    raise OSError("not permitted")


FULL = Usage(10**9, 10**9, 10**6)
FAULTS: list[tuple[str, str, Breaks]] = [
    ("transformers", "install a supported version: transformers", version("transformers", "4.57.0")),
    ("lightning", "change every password", version("lightning", "2.6.2")),
    ("torch and GPUs", "install a torch built for CUDA", put(environment, "visible_gpus", lambda environ: 8)),
    ("disk of the runs root", "free space", put(shutil, "disk_usage", lambda place: FULL)),
    ("disk of the cache", "LIGHTNING_HUB_CACHE", put(shutil, "disk_usage", lambda place: FULL)),
    ("runs root", "--runs-root", put(os, "access", lambda place, mode: False)),
    ("shared memory", "--shm-size", put(shutil, "disk_usage", lambda place: Usage(64e6, 0, 64e6))),
    ("loopback network", "127.0.0.1", put(socket, "create_server", no_network)),
    ("open files", "ulimit -n", put(resource, "getrlimit", lambda kind: (256, 256))),
]


@pytest.mark.parametrize(("check", "remedy", "breaks"), FAULTS, ids=[check for check, *_ in FAULTS])
def test_what_is_wrong_is_said_with_its_remedy(
    check: str, remedy: str, breaks: Breaks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if check == "torch and GPUs":
        monkeypatch.setattr(environment, "_torch_build", lambda: None)
    breaks(monkeypatch)
    finding = found(tmp_path)[check]
    assert not finding.ok
    assert remedy in (finding.remedy or "")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert found(tmp_path)["datasets"].detail == "not installed"


def test_a_check_creates_nothing(tmp_path: Path) -> None:
    found(tmp_path)
    assert not list(tmp_path.iterdir())


def test_json_is_one_list_and_the_exit_code_says_whether_all_passed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Finding("disk", False, "full", "free space")
    for findings, code in (([Finding("disk", True, "free")], 0), ([wrong], 3)):
        monkeypatch.setattr("lightning_hub.commands.doctor.check_machine", lambda runs, given=findings: given)
        assert run(["doctor", "--json"]) == code
        assert json.loads(capsys.readouterr().out) == [finding.to_json() for finding in findings]
    assert run(["doctor"]) == 3
    assert capsys.readouterr().out.startswith("FAIL  disk")
