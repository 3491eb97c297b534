"""Prepared data on disk, named by a hash of all that shaped it, made once and shared by all processes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from lightning_hub.errors import ConfigError

_T = TypeVar("_T")

_NOT_PREPARATION = {
    "packing.py",
    "step_plan.py",
    "datamodule.py",
    "inspection.py",
    "cache.py",
    "checks.py",
    "prompts.py",
}


def code_version() -> str:
    """A hash of the code that prepares data, and the versions of the libraries that render and tokenise."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        if path.name not in _NOT_PREPARATION:
            digest.update(path.name.encode() + path.read_bytes())
    libraries = [metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")]
    return f"{digest.hexdigest()} {' '.join(libraries)}"


def key_of(identity: Mapping[str, object]) -> str:
    """The name of an entry: a hash of everything that shaped its content."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class Cache:
    """Folders that are either absent or whole.

    Args:
        root: Where entries live; made if absent.
        notify: Tells a person that this process waits for another.
    """

    def __init__(self, root: Path, notify: Callable[[str], None]) -> None:
        self.root = root / "data"
        self.notify = notify

    def get_or_make(self, key: str, make: Callable[[Path], None], load: Callable[[Path], _T]) -> tuple[_T, bool]:
        """Load an entry, or have it made by exactly one of all processes that want it.

        Args:
            key: The name of the entry.
            make: Writes it into the folder that it is given.
            load: Reads it; an OSError or ValueError means that it is damaged and made anew.

        Returns:
            What ``load`` gave, and whether the entry was there before.
        """
        entry = self.root / key[:40]
        found = _try(load, entry)
        if found is not None:
            return found, True
        lock = self._lock(entry)
        try:
            found = _try(load, entry)
            if found is not None:
                return found, True
            self._make(entry, make)
        finally:
            lock.release()
        return load(entry), False

    def _lock(self, entry: Path) -> FileLock:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{entry}.lock")
            lock.acquire(timeout=0)
        except Timeout:
            self.notify("another process prepares the same data; waiting for it")
            lock.acquire()
        except OSError as error:
            raise ConfigError(
                f"the cache folder cannot be written: {error}",
                where=str(self.root),
                remedy="set LIGHTNING_HUB_CACHE to a folder with room",
            ) from error
        return lock

    def _make(self, entry: Path, make: Callable[[Path], None]) -> None:
        temporary = entry.with_name(f"{entry.name}.tmp")
        for leftover in (entry, temporary):  # damaged, or of a process that was killed: the lock is ours
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        try:
            make(temporary)
            temporary.rename(entry)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _try(load: Callable[[Path], _T], entry: Path) -> _T | None:
    try:
        return load(entry)
    except (OSError, ValueError, KeyError):
        return None
