"""Finds the valid checkpoints of a run, from manifests, sizes and hashes, without heavy imports.

A folder without a readable manifest is not a checkpoint. The manifest has the size and the hash of every file, so a
checkpoint can be verified byte by byte.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lightning_hub.errors import ConfigError, ExitCode, HubError
from lightning_hub.runs.folder import CHECKPOINT_PREFIX

MANIFEST = "manifest.json"
FORMAT = 2
"""Version of the format of a checkpoint folder. Version 2 stores tensors by name, one file for each writer."""

_NAME = re.compile(rf"{CHECKPOINT_PREFIX}(\d+)")


class DamagedError(HubError):
    """A checkpoint does not match its manifest."""

    exit_code = ExitCode.NO_CHECKPOINT
    kind = "disk"


@dataclass(frozen=True)
class Manifest:
    """The content of a checkpoint.

    Attributes:
        step: Number of finished optimizer steps.
        world_size: Number of ranks that wrote it.
        strategy: Short name of the strategy.
        files: Size in bytes and sha256 of each file, by its name in the folder.
        facts: Values that a resume compares: the hash of the data, batch settings and others.
        schema: Version of this format.
    """

    step: int
    world_size: int
    strategy: str
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    schema: int = FORMAT


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint; the files are not checked.

    Raises:
        DamagedError: There is no manifest, or it cannot be read.
    """
    try:
        given = json.loads((folder / MANIFEST).read_bytes())
        if given["schema"] != FORMAT:
            raise ValueError(f"its format is {given['schema']}, this version reads {FORMAT}")
        return Manifest(**{**given, "files": {name: tuple(entry) for name, entry in given["files"].items()}})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"no readable manifest ({error})", where=str(folder)) from error


def verify(folder: Path, share: int = 0, shares: int = 1) -> Manifest:
    """Read the manifest of a checkpoint and compare every file with it.

    Args:
        folder: The checkpoint.
        share: The number of this process; it hashes every file whose index modulo ``shares`` is this number. The
            sizes of all files are compared in each process.
        shares: The number of processes that split the files.

    Raises:
        DamagedError: A file does not match; the message names the file and the difference.
    """
    manifest = read_manifest(folder)
    for index, (name, (size, digest)) in enumerate(manifest.files.items()):
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise DamagedError(f"{name} is missing", where=str(folder))
        if path.stat().st_size != size:
            raise DamagedError(f"{name} has {path.stat().st_size} bytes instead of {size}", where=str(folder))
        if index % shares == share and _hash(path, folder) != digest:
            raise DamagedError(f"the sha256 of {name} is not the one in the manifest", where=str(folder))
    return manifest


def step_of(folder: Path) -> int:
    """Return the number of finished steps of a checkpoint: from its manifest, or from its name without a manifest."""
    if (folder / MANIFEST).is_file():
        return read_manifest(folder).step
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else 0


def resolve_checkpoint(text: str, *, trusted: bool = False) -> Path:
    """Return the checkpoint folder of a value of ``--resume``.

    Args:
        text: The value.
        trusted: Whether a folder without a manifest is accepted.

    Raises:
        ConfigError: The value is a URL, not a folder, or a folder without a manifest.
    """
    if "://" in text:
        raise ConfigError(
            f"{text} is a URL", where="--resume", remedy="copy the checkpoint to this machine and give its path"
        )
    path = Path(text).resolve()
    if not path.is_dir():
        message = f"{text} is not a checkpoint folder"
        raise ConfigError(message, where="--resume", remedy="give a step-<n> folder of a run")
    if not trusted and not (path / MANIFEST).is_file():
        raise check_untrusted(path)
    return path


def check_untrusted(folder: Path) -> ConfigError:
    """Return the error for a checkpoint folder without a manifest, whose origin is unknown."""
    remedy = "give another folder, or pass --trust-checkpoint if you trust its origin; code in it is never run"
    return ConfigError("this folder has no manifest of Lightning Hub", where=str(folder), remedy=remedy)


def list_checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield step and path of each folder with the name of a checkpoint, newest first, not verified."""
    found = [
        (int(match[1]), path) for path in folder.glob(f"{CHECKPOINT_PREFIX}*") if (match := _NAME.fullmatch(path.name))
    ]
    yield from sorted(found, reverse=True)


def newest_valid(folder: Path) -> tuple[Path | None, list[DamagedError]]:
    """Return the newest valid checkpoint (or None), and the errors of the newer ones."""
    damaged = []
    for _, path in list_checkpoints(folder):
        try:
            verify(path)
        except DamagedError as error:
            damaged.append(error)
            continue
        return path, damaged
    return None, damaged


def _hash(path: Path, folder: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DamagedError(f"{path.name} cannot be read ({error})", where=str(folder)) from error
