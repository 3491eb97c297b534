"""Writes checkpoint folders so that they are complete or do not exist.

A checkpoint is built in a temporary folder on the same file system and flushed to disk; its manifest is written last,
and then the folder is renamed. A folder without a valid manifest is not a checkpoint. With a manifest every byte can be
verified, because it has the size and the hash of every file. Several ranks build one folder together: each writes and
hashes its own files, and rank 0 does the rest.
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
from lightning_hub.runs.folder import CHECKPOINT_PREFIX
from lightning_hub.runs.manifest import MANIFEST, Manifest, list_checkpoints

_T = TypeVar("_T")

LATEST = "latest"

Files: TypeAlias = dict[str, tuple[int, str]]
"""Size in bytes and sha256 of files, by their names in a folder."""


class DiskFullError(HubError):
    """There is not enough free space for a checkpoint."""

    kind = "disk"


def write_file(path: Path, blocks: Iterable[bytes | memoryview]) -> Files:
    """Write a new file block by block, compute its hash, and flush it to disk.

    While one block is written and hashed, the next one is copied from the device: hashing takes as long as writing.
    There are at most three blocks in memory.
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
    """Build a folder and rename it to ``target``; every one of ``ranks`` must call this.

    Args:
        target: The final path. An existing folder is replaced when the new one is complete.
        manifest: The manifest without files; their sizes and hashes are added.
        write: Writes the files of this rank into a folder, with `write_file`.
        needed_bytes: Bytes of the files of this rank; the free space is checked before anything is written.
        ranks: The ranks that build the folder; None for this process alone.

    Returns:
        The manifest as written.

    Raises:
        DiskFullError: There is not enough free space, before or during the write; nothing is left on disk.
        HubError: The error of any rank, on all of them.
    """
    ranks = ranks or Ranks(alone=True)
    building = target.with_name(target.name + ".tmp")
    needed = sum(ranks.all_gather_object(needed_bytes))

    def publish(written: list[Files]) -> Manifest:
        complete = replace(manifest, files={name: entry for files in written for name, entry in sorted(files.items())})
        _check_shared(building, complete)
        write_file(building / MANIFEST, [json.dumps(asdict(complete), indent=1).encode() + b"\n"])
        _flush(building)
        delete_checkpoint(target)
        building.rename(target)
        _flush(target.parent)
        return complete

    try:
        ranks.run_on_rank_zero(lambda: _on_disk(target, lambda: _prepare(target, building, needed)))
        written = ranks.run_on_all(lambda: _on_disk(target, lambda: write(building)))
        return ranks.run_on_rank_zero(lambda: _on_disk(target, lambda: publish(written)))
    except BaseException:
        if ranks.rank == 0:
            shutil.rmtree(building, ignore_errors=True)
        raise


def _prepare(target: Path, building: Path, needed: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    shutil.rmtree(building, ignore_errors=True)
    free = shutil.disk_usage(target.parent).free
    if free < needed * 1.05:
        raise _disk_full(target, f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free")
    building.mkdir(mode=0o700)


def _check_shared(building: Path, manifest: Manifest) -> None:
    """Raise an error if rank 0 does not see the files of another rank: the nodes do not share the file system."""
    for name, (size, _) in manifest.files.items():
        if not (building / name).is_file() or (building / name).stat().st_size != size:
            message = f"rank 0 does not see {name}, which another rank has written"
            raise HubError(message, where=str(building), remedy="keep runs on a file system that all nodes share")


def _on_disk(target: Path, work: Callable[[], _T]) -> _T:
    """Call a function; an error of the file system becomes a DiskFullError with its text."""
    try:
        return work()
    except OSError as error:
        raise _disk_full(target, str(error)) from error


def point_latest(target: Path) -> None:
    """Make the link ``latest`` beside ``target`` point to it, in one rename."""
    link = target.with_name(LATEST + ".tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    link.replace(target.with_name(LATEST))


def delete_checkpoint(target: Path) -> None:
    """Delete a checkpoint, if it exists.

    It is renamed before its files are deleted, so that a kill in between does not leave a damaged checkpoint.
    """
    if target.exists():
        old = target.with_name(target.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def prune(folder: Path, keep: set[Path]) -> None:
    """Delete committed checkpoints that are not in ``keep``, and incomplete ones."""
    for _, path in list_checkpoints(folder):
        if path not in keep:
            delete_checkpoint(path)
    for leftover in [*folder.glob(f"{CHECKPOINT_PREFIX}*.old"), *folder.glob(f"{CHECKPOINT_PREFIX}*.tmp")]:
        shutil.rmtree(leftover, ignore_errors=True)


def _disk_full(target: Path, reason: str) -> DiskFullError:
    return DiskFullError(f"cannot write the checkpoint: {reason}", where=str(target), remedy="free space and resume")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
