"""Prepared data on disk, named by a hash of everything that shapes it; made once, shared by all processes.

The name depends on the content and the paths of the inputs (the report has the paths), the tokenizer, the template, the
settings, the versions of the libraries that render and tokenise, and our own code in ``MAKES_SAMPLES``. So moved files
get a new entry. Whether the samples of two entries are equal is a question for their fingerprints (`SampleStore`).
"""

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

_FOLDER = Path(__file__).parent

MAKES_SAMPLES = (
    "readers", "masking", "prepare.py", "collect.py", "encoded_example.py", "encode.py", "conversation.py",
    "settings.py", "report.py", "sample_store.py",
)  # fmt: skip
"""Folders (with all that they contain) and modules that shape samples and their reports.

Outside of ``data/`` only values shape samples: tokenizer, template, stop ids and ignore index. The key contains them.
"""


def files_that_make_samples() -> list[Path]:
    """The source files of ``MAKES_SAMPLES``, sorted."""
    named = [_FOLDER / name for name in MAKES_SAMPLES]
    return sorted(path for name in named for path in (name.rglob("*.py") if name.is_dir() else [name]))


def code_version() -> str:
    """A hash of the code that makes samples, and the versions of the libraries that render and tokenise."""
    digest = hashlib.sha256()
    for path in files_that_make_samples():
        digest.update(path.relative_to(_FOLDER).as_posix().encode() + path.read_bytes())
    libraries = [metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")]
    return f"{digest.hexdigest()} {' '.join(libraries)}"


def key_of(identity: Mapping[str, object]) -> str:
    """The name of an entry: a hash of everything that shapes its content."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class Cache:
    """Folders that are either absent or complete.

    Args:
        root: The folder of all entries; made if absent.
        notify: Prints that this process waits for another one.
    """

    def __init__(self, root: Path, notify: Callable[[str], None]) -> None:
        self.root = root / "data"
        self.notify = notify

    def get_or_make(self, key: str, make: Callable[[Path], None], load: Callable[[Path], _T]) -> tuple[_T, bool]:
        """Load an entry, or make it; of several processes that need it, exactly one makes it.

        Args:
            key: The name of the entry.
            make: Writes the entry into a folder.
            load: Reads an entry; an OSError or ValueError means that it is damaged and is made again.

        Returns:
            The result of ``load``, and whether the entry existed before.
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
                remedy="set LIGHTNING_HUB_CACHE to a folder with free space",
            ) from error
        return lock

    def _make(self, entry: Path, make: Callable[[Path], None]) -> None:
        temporary = entry.with_name(f"{entry.name}.tmp")
        for leftover in (entry, temporary):  # damaged, or of a killed process: this process holds the lock
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
