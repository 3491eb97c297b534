"""Which checkpoints of a run are whole: manifests, sizes and hashes, read without loading anything heavy.

A folder without a valid manifest does not exist; a folder with one can be trusted byte by byte, because the manifest
knows the size and the hash of every file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lightning_hub.errors import ConfigError, ExitCode, HubError

MANIFEST = "manifest.json"
FORMAT = 2
"""Version of what a checkpoint folder holds: 2 keeps tensors by name, in as many parts as there were writers."""

_NAME = re.compile(r"step-(\d+)")


class DamagedError(HubError):
    """A checkpoint is not what its manifest says."""

    exit_code = ExitCode.NO_CHECKPOINT
    kind = "disk"


@dataclass(frozen=True)
class Manifest:
    """What a committed checkpoint holds.

    Attributes:
        step: Finished optimizer steps.
        world_size: Processes that wrote it.
        strategy: The strategy's word.
        files: Size in bytes and sha256 of each file, by its name in the folder.
        facts: What a resume compares with: the hash of the data, batch settings and the like.
        schema: Version of this format.
    """

    step: int
    world_size: int
    strategy: str
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    schema: int = FORMAT


def read_manifest(folder: Path) -> Manifest:
    """Return a checkpoint's manifest; its files are not looked at.

    Raises:
        DamagedError: There is none, or it cannot be read.
    """
    try:
        given = json.loads((folder / MANIFEST).read_bytes())
        if given["schema"] != FORMAT:
            raise ValueError(f"its format is {given['schema']}, this version reads {FORMAT}")
        return Manifest(**{**given, "files": {name: tuple(entry) for name, entry in given["files"].items()}})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"no readable manifest ({error})", where=str(folder)) from error


def verify(folder: Path, share: int = 0, shares: int = 1) -> Manifest:
    """Read a checkpoint's manifest and compare every file with it.

    Args:
        folder: The checkpoint.
        share: Which share of the files this process hashes; their sizes are always compared.
        shares: How many processes share them out.

    Raises:
        DamagedError: What is wrong, and with which file.
    """
    manifest = read_manifest(folder)
    for place, (name, (size, digest)) in enumerate(manifest.files.items()):
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise DamagedError(f"{name} is missing", where=str(folder))
        if path.stat().st_size != size:
            raise DamagedError(f"{name} has {path.stat().st_size} bytes instead of {size}", where=str(folder))
        if place % shares == share and _hash(path, folder) != digest:
            raise DamagedError(f"{name} has another sha256 than its manifest", where=str(folder))
    return manifest


def step_of(folder: Path) -> int:
    """Return how many steps a checkpoint has finished: as its manifest says, or its name where it has none."""
    if (folder / MANIFEST).is_file():
        return read_manifest(folder).step
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else 0


def resolve_checkpoint(text: str, *, trusted: bool = False) -> Path:
    """Return the checkpoint that somebody named.

    Args:
        text: What was given.
        trusted: Whether a folder without a manifest of ours will do.

    Raises:
        ConfigError: It is an address, or no folder of ours.
    """
    if "://" in text:
        raise ConfigError(
            f"{text} is an address", where="--resume", remedy="copy the checkpoint here and give its path"
        )
    path = Path(text).resolve()
    if not path.is_dir():
        raise ConfigError(f"{text} is no checkpoint folder", where="--resume", remedy="give a step-<n> folder of a run")
    if not trusted and not (path / MANIFEST).is_file():
        raise check_untrusted(path)
    return path


def check_untrusted(folder: Path) -> ConfigError:
    """Return what to say of a folder whose origin nothing vouches for."""
    remedy = "give another, or pass --trust-checkpoint if you know where it comes from; no code in it is run either way"
    return ConfigError("this folder has no manifest of ours", where=str(folder), remedy=remedy)


def list_checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield step and path of what lies under a final name, newest first, unverified."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    yield from sorted(found, reverse=True)


def newest_valid(folder: Path) -> tuple[Path | None, list[DamagedError]]:
    """Return the newest checkpoint that verifies, and what was wrong with the newer ones."""
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
