"""Disks that are full, pipes that say nothing, locales that know few characters: one sentence, no traceback."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_hub.runs.folder import RunFolder, find_run, list_runs
from lightning_hub.runs.writer import RunWriter
from tests.conftest import PATIENCE
from tests.runs.conftest import NEW

HUB = f"{shlex.quote(sys.executable)} -m lightning_hub"
PLAIN_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def shell(line: str, **env: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, **env}
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env=environ, timeout=PATIENCE, check=False
    )


def test_output_that_the_disk_does_not_take_is_one_sentence() -> None:
    done = shell(f"{HUB} schema > /dev/full")
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write to the disk: [Errno 28] No space left on device")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in shell(f"{HUB} --help > /dev/full").stderr


def test_an_error_that_nobody_reads_keeps_its_exit_code() -> None:
    assert shell(f"{HUB} fti 2> /dev/full").returncode == 2
    assert shell(f"{HUB} fti >&- 2>&-").returncode == 2


@pytest.mark.slow
def test_a_pipe_into_which_nobody_writes_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    done = shell(f"{HUB} fit --config {pipe} --print_config")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    recipe = "model: {class_path: SFT, init_args: {model: demo}}"
    said = shell(f"{HUB} fit --config <(sleep 0.2; echo '{recipe}') --data ChatData --data.train x --print_config")
    assert said.returncode == 0, said.stderr
    assert "model: demo" in said.stdout


def test_a_locale_that_knows_few_characters_is_no_fault(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    model, data = (
        "{class_path: SFT, init_args: {model: \u00e9t\u00e9}}",
        "{class_path: ChatData, init_args: {train: x}}",
    )
    recipe.write_text(f"# \u4f60\u597d\nmodel: {model}\ndata: {data}\n", encoding="utf-8")
    done = shell(f"{HUB} fit --config {recipe} --print_config", **PLAIN_LOCALE)
    assert done.returncode == 0, done.stderr
    assert "\\xe9t\\xe9" in done.stdout


@pytest.mark.parametrize("name", ["a", "z"])
def test_the_newest_run_is_that_which_was_made_last(tmp_path: Path, name: str) -> None:
    for number, made in enumerate(("m", name)):
        folder = RunFolder(tmp_path / made)
        folder.path.mkdir()
        RunWriter.create(folder, NEW).close()
        text = folder.run_json.read_text()
        created = folder.info().created
        folder.run_json.write_text(text.replace(created, f"2026-01-0{number + 1}T00:00:00.000Z"))
    assert [run.id for run in list_runs(tmp_path)] == ["m", name]
    with pytest.raises(Exception, match=f"the newest is {name}"):
        find_run("nothing", tmp_path)


SMALL_DISK = """
mount -t tmpfs -o size=64k tmpfs {root} && dd if=/dev/zero of={root}/full bs=1k 2>/dev/null
{hub} fit --model SFT --model.model demo --data ChatData --data.train {rows} --runs-root {root}
"""


def test_a_full_disk_of_runs_is_one_sentence(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": []}\n')
    root = tmp_path / "root"
    root.mkdir()
    if shell(f"unshare -m mount -t tmpfs tmpfs {root}").returncode:
        pytest.skip("this user may not mount a small disk")
    script = SMALL_DISK.format(root=root, hub=HUB, rows=rows)
    done = shell(f"unshare -m bash -c {shlex.quote(script)}")
    assert done.returncode == 2, done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
