"""Folders that appear whole or not at all.

A checkpoint is built beside its final place, on the same file system, flushed to disk, described by a manifest that
is written last, and renamed. A folder without a valid manifest does not exist; a folder with one can be trusted byte
by byte, because the manifest knows the size and the hash of every file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from lightning_hub.errors import HubError
from lightning_hub.runs.manifest import MANIFEST, Manifest, committed, file_hash

LATEST = "latest"


class DiskFullError(HubError):
    """There is no room for a checkpoint."""

    kind = "disk"


def commit(target: Path, manifest: Manifest, write: Callable[[Path], None], needed_bytes: int = 0) -> Manifest:
    """Build a folder and put it in place.

    Args:
        target: The final path; it must not exist.
        manifest: What is known before the files are written; their sizes and hashes are filled in.
        write: Writes the files into the folder it is given.
        needed_bytes: What it will take on disk, checked before anything is written.

    Returns:
        The manifest as written.

    Raises:
        DiskFullError: There is no room, before or while writing; nothing is left behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    free = shutil.disk_usage(target.parent).free
    if free < needed_bytes * 1.05:
        raise _no_room(target, f"{needed_bytes / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free")
    building = target.with_name(target.name + ".tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(mode=0o700)
    try:
        write(building)
        files = {path.name: (path.stat().st_size, file_hash(path)) for path in sorted(building.iterdir())}
        for name in files:
            (building / name).chmod(0o600)
            _flush(building / name)
        whole = Manifest(**{**asdict(manifest), "files": files})
        (building / MANIFEST).write_text(json.dumps(asdict(whole), indent=1) + "\n")
        (building / MANIFEST).chmod(0o600)
        _flush(building / MANIFEST)
        _flush(building)
        building.rename(target)
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)
        raise _no_room(target, str(error)) from error
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    _flush(target.parent)
    return whole


def point_latest(target: Path) -> None:
    """Make ``latest`` beside ``target`` a link to it, in one rename."""
    link = target.with_name(LATEST + ".tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    link.replace(target.with_name(LATEST))


def retire(target: Path) -> None:
    """Remove a checkpoint, if it exists.

    It loses its name before its files, so that a kill in between leaves no damaged checkpoint behind.
    """
    if target.exists():
        old = target.with_name(target.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def prune(folder: Path, keep: set[Path]) -> None:
    """Remove committed checkpoints that are not in ``keep``, and half-built ones."""
    for _, path in committed(folder):
        if path not in keep:
            retire(path)
    for leftover in [*folder.glob("step-*.old"), *folder.glob("step-*.tmp")]:
        shutil.rmtree(leftover, ignore_errors=True)


def _no_room(target: Path, reason: str) -> DiskFullError:
    return DiskFullError(f"cannot write the checkpoint: {reason}", where=str(target), remedy="free space and resume")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
