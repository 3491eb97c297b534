from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_hub.checkpoints.storage import DiskFullError, Files, commit, point_latest, prune, write_file
from lightning_hub.runs.manifest import DamagedError, Manifest, list_checkpoints, newest_valid, verify
from tests.conftest import PATIENCE
from tests.warm import warm_context


def write_two(folder: Path) -> Files:
    return write_file(folder / "a.bin", [os.urandom(4000), os.urandom(1000)]) | write_file(
        folder / "b.bin", [b"b" * 100]
    )


def make(root: Path, step: int) -> Path:
    target = root / f"step-{step}"
    commit(target, Manifest(step, 1, "single"), write_two)
    return target


def test_a_committed_folder_verifies(tmp_path: Path) -> None:
    target = make(tmp_path, 3)
    manifest = verify(target)
    assert manifest.step == 3
    assert set(manifest.files) == {"a.bin", "b.bin"}
    assert {path.stat().st_mode & 0o777 for path in target.iterdir()} == {0o600}
    assert not list(tmp_path.glob("*.tmp"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte": (lambda folder: flip(folder / "a.bin"), "sha256 of a.bin is not"),
    "cut": (lambda folder: os.truncate(folder / "a.bin", 100), "100 bytes instead of 5000"),
    "empty": (lambda folder: os.truncate(folder / "b.bin", 0), "0 bytes instead of 100"),
    "missing file": (lambda folder: (folder / "b.bin").unlink(), r"b\.bin is missing"),
    "missing manifest": (lambda folder: (folder / "manifest.json").unlink(), "no readable manifest"),
    "cut manifest": (lambda folder: os.truncate(folder / "manifest.json", 30), "no readable manifest"),
}


@pytest.mark.fault("F20")
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_the_next_older_used(tmp_path: Path, damage: str) -> None:
    older, newer = make(tmp_path, 1), make(tmp_path, 2)
    harm, message = DAMAGE[damage]
    harm(newer)
    with pytest.raises(DamagedError, match=message):
        verify(newer)
    found, damaged = newest_valid(tmp_path)
    assert found == older
    assert len(damaged) == 1


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> Files:
        write_two(folder)
        raise OSError(28, "No space left on device")

    older = make(tmp_path, 1)
    with pytest.raises(DiskFullError, match="No space left"):
        commit(tmp_path / "step-2", Manifest(2, 1, "single"), fail)
    with pytest.raises(DiskFullError, match="are needed and"):
        commit(tmp_path / "step-2", Manifest(2, 1, "single"), write_two, needed_bytes=10**18)
    assert [path for _, path in list_checkpoints(tmp_path)] == [older]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1"]


def test_prune_and_latest(tmp_path: Path) -> None:
    paths = [make(tmp_path, step) for step in (1, 2, 10)]
    (tmp_path / "step-11.tmp").mkdir()
    point_latest(paths[1])
    point_latest(paths[2])
    prune(tmp_path, {paths[0], paths[2]})
    assert (tmp_path / "latest").resolve() == paths[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-1", "step-10"]


def write_for_ever(root: Path) -> None:
    def write(folder: Path) -> Files:
        return {k: v for name in "abc" for k, v in write_file(folder / name, [os.urandom(200_000)]).items()}

    step = newest(root)
    while True:
        step += 1
        commit(root / f"step-{step}", Manifest(step, 1, "single"), write)
        point_latest(root / f"step-{step}")
        prune(root, {path for _, path in list(list_checkpoints(root))[:2]})


def newest(root: Path) -> int:
    return max((step for step, _ in list_checkpoints(root)), default=0)


def kill_while_saving(root: Path, kills: int) -> None:
    source = random.Random(0)
    best = 0
    for _ in range(kills):
        began = newest(root)
        process = warm_context().Process(target=write_for_ever, args=(root,))
        process.start()
        end = time.monotonic() + PATIENCE
        while newest(root) <= began:
            assert time.monotonic() < end
            assert process.is_alive()
        time.sleep(source.uniform(0.0, 0.1))  # the random moment is the point
        process.kill()
        process.join()
        for step, path in list_checkpoints(root):
            assert verify(path).step == step
        found, damaged = newest_valid(root)
        if found is not None:
            step = json.loads((found / "manifest.json").read_text())["step"]
            assert step >= best
            best = step
        assert not damaged
    assert best >= kills


@pytest.mark.slow
@pytest.mark.fault("F17")
def test_kills_while_saving_leave_only_whole_checkpoints(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 5)


@pytest.mark.long
def test_fifty_kills_while_saving(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 50)
