"""Folders that appear whole or not at all.

A checkpoint is built beside its final place, on the same file system, flushed to disk, described by a manifest that
is written last, and renamed. A folder without a valid manifest does not exist; a folder with one can be trusted byte
by byte, because the manifest knows the size and the hash of every file. Several processes build one folder together:
each writes and hashes files of its own, rank 0 does the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeAlias, TypeVar

from lightning_hub.errors import HubError
from lightning_hub.parallel.collectives import Ranks
from lightning_hub.runs.manifest import MANIFEST, Manifest, list_checkpoints

_T = TypeVar("_T")

LATEST = "latest"

Files: TypeAlias = dict[str, tuple[int, str]]
"""Size in bytes and sha256 of files, by their names in a folder."""


class DiskFullError(HubError):
    """There is no room for a checkpoint."""

    kind = "disk"


def write_file(path: Path, blocks: Iterable[bytes | memoryview]) -> Files:
    """Write a new file block by block, hash it on the way, and flush it to disk.

    Blocks are made (copied from a device), written and hashed at the same time, one of each: hashing alone takes as
    long as writing. So three blocks at most are held.
    """
    digest, size = hashlib.sha256(), 0
    source = iter(blocks)
    with path.open("xb") as stream, ThreadPoolExecutor(2) as workers:
        os.fchmod(stream.fileno(), 0o600)
        block = next(source, None)
        while block is not None:
            following = workers.submit(next, source, None)
            hashed = workers.submit(digest.update, block)
            stream.write(block)
            size += memoryview(block).nbytes
            hashed.result()
            block = following.result()
        stream.flush()
        os.fsync(stream.fileno())
    return {path.name: (size, digest.hexdigest())}


def commit(
    target: Path, manifest: Manifest, write: Callable[[Path], Files], needed_bytes: int = 0, ranks: Ranks | None = None
) -> Manifest:
    """Build a folder and put it in place; every process of the crew must call this.

    Args:
        target: The final path. What lies there is replaced once the new folder is whole.
        manifest: What is known before the files are written; their sizes and hashes are filled in.
        write: Writes this process's files into the folder it is given, with `write_file`.
        needed_bytes: What this process's files will take on disk, checked before anything is written.
        ranks: The processes that build it; this one alone if None.

    Returns:
        The manifest as written.

    Raises:
        DiskFullError: There is no room, before or while writing; nothing is left behind.
        HubError: Whatever went wrong in one process, in all of them.
    """
    ranks = ranks or Ranks(alone=True)
    building = target.with_name(target.name + ".tmp")
    needed = sum(ranks.all_gather_object(needed_bytes))

    def put_in_place(parts: list[Files]) -> Manifest:
        whole = replace(manifest, files={name: entry for files in parts for name, entry in sorted(files.items())})
        _check_shared(building, whole)
        write_file(building / MANIFEST, [json.dumps(asdict(whole), indent=1).encode() + b"\n"])
        _flush(building)
        delete_checkpoint(target)
        building.rename(target)
        _flush(target.parent)
        return whole

    try:
        ranks.run_on_rank_zero(lambda: _on_disk(target, lambda: _prepare(target, building, needed)))
        parts = ranks.run_on_all(lambda: _on_disk(target, lambda: write(building)))
        return ranks.run_on_rank_zero(lambda: _on_disk(target, lambda: put_in_place(parts)))
    except BaseException:
        if ranks.rank == 0:
            shutil.rmtree(building, ignore_errors=True)
        raise


def _prepare(target: Path, building: Path, needed: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    shutil.rmtree(building, ignore_errors=True)
    free = shutil.disk_usage(target.parent).free
    if free < needed * 1.05:
        raise _no_room(target, f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free")
    building.mkdir(mode=0o700)


def _check_shared(building: Path, manifest: Manifest) -> None:
    """Refuse a folder in which rank 0 does not see what the others wrote: their nodes have a disk of their own."""
    for name, (size, _) in manifest.files.items():
        if not (building / name).is_file() or (building / name).stat().st_size != size:
            message = f"rank 0 does not see {name}, which another rank has written"
            raise HubError(message, where=str(building), remedy="keep runs on a file system that all nodes share")


def _on_disk(target: Path, work: Callable[[], _T]) -> _T:
    """Do something, and say in one sentence what the file system has against it."""
    try:
        return work()
    except OSError as error:
        raise _no_room(target, str(error)) from error


def point_latest(target: Path) -> None:
    """Make ``latest`` beside ``target`` a link to it, in one rename."""
    link = target.with_name(LATEST + ".tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    link.replace(target.with_name(LATEST))


def delete_checkpoint(target: Path) -> None:
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
    for _, path in list_checkpoints(folder):
        if path not in keep:
            delete_checkpoint(path)
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
