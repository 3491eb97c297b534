"""Opens named inputs: files, folders, patterns, saved ``datasets`` folders and hub ids, each with a content hash."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from lightning_hub.data.readers.columnar import restore_example
from lightning_hub.data.readers.examples import RawExample
from lightning_hub.data.readers.files import is_data_file, kind_of, read_examples
from lightning_hub.data.readers.limits import ExampleLimits
from lightning_hub.data.settings import TRAIN_KEY, InputError, Source
from lightning_hub.errors import ConfigError, DataError


class Input(Protocol):
    """One opened source: its examples, and a hash of their content.

    Attributes:
        not_read: Names of files in the source that are not read.
    """

    @property
    def not_read(self) -> tuple[str, ...]:
        """Names of files in the source that are not read."""

    def examples(self) -> Iterator[RawExample]:
        """All examples in their order."""

    def digest(self) -> dict[str, str]:
        """Content hashes by name, for the report and the cache key."""


@dataclass(frozen=True)
class FileInput:
    """Files that are read one after the other.

    Attributes:
        paths: The files.
        limits: How large and deep an example may be.
        not_read: Files next to them that are not data.
    """

    paths: tuple[Path, ...]
    limits: ExampleLimits
    not_read: tuple[str, ...] = ()

    def examples(self) -> Iterator[RawExample]:
        """All examples of all files in their order."""
        for path in self.paths:
            yield from read_examples(path, self.limits)

    def digest(self) -> dict[str, str]:
        """The sha256 of the bytes of each file."""
        return {str(path): _sha256(path) for path in self.paths}


class _ArrowDataset(Protocol):
    """The part of a ``datasets.Dataset`` that is used here (the package has no types)."""

    _fingerprint: str
    features: Mapping[str, object]

    def __iter__(self) -> Iterator[dict[str, object]]: ...


@dataclass(frozen=True)
class DatasetInput:
    """A ``datasets`` object: from a saved folder or from the hub."""

    name: str
    dataset: _ArrowDataset
    limits: ExampleLimits
    not_read: tuple[str, ...] = ()

    def examples(self) -> Iterator[RawExample]:
        """All examples; the place of an example is its number, counted from 1."""
        own_nulls = frozenset(name for name, kind in self.dataset.features.items() if type(kind).__name__ == "Json")
        for number, data in enumerate(self.dataset, 1):
            where = f"{self.name}:{number}"
            if self.limits.is_too_large(data):
                yield RawExample(where, {}, f"the example is {self.limits.too_large}")
            else:
                yield RawExample(where, restore_example(data, own_nulls))

    def digest(self) -> dict[str, str]:
        """The fingerprint that ``datasets`` keeps of content and history."""
        return {self.name: self.dataset._fingerprint}


def open_source(source: Source, limits: ExampleLimits | None = None, where: str = TRAIN_KEY) -> Input:
    """Open what a source names.

    It is tried as a file, a folder of files, a pattern, a folder written by ``save_to_disk``, and a hub id, in this
    order.

    Args:
        source: Its name, and the split.
        limits: How large and deep an example may be.
        where: The option that names it, for errors.

    Raises:
        InputError: It does not exist, or no reader knows this kind of file.
        ConfigError: The hub or the saved dataset does not have it.
        DataError: A saved dataset is damaged.
    """
    limits = limits or ExampleLimits()
    path = Path(source.path).expanduser()
    if _is_file(path):
        kind_of(path, where)
        return FileInput((path,), limits)
    if path.is_dir():
        return _open_folder(path, source, limits, where)
    if glob.has_magic(source.path):
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]  # noqa: PTH207 (absolute patterns too)
        return _files(source.path, found, limits, where)
    if _looks_like_hub_id(source.path):
        return _open_hub(source, limits)
    raise InputError(f"{source.path!r} does not exist", where=where, remedy="check the path")


def _is_file(path: Path) -> bool:
    """Whether the file exists; False for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _open_folder(path: Path, source: Source, limits: ExampleLimits, where: str) -> Input:
    if any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        return _open_saved(path, source, limits)
    return _files(source.path, list(path.iterdir()), limits, where)


def _files(name: str, found: list[Path], limits: ExampleLimits, where: str) -> FileInput:
    paths = tuple(sorted(path for path in found if path.is_file() and is_data_file(path)))
    others = sorted(path.name for path in found if path not in paths and not path.name.startswith("."))
    if not paths:
        inside = next(
            (path for path in sorted(found) if path.is_dir() and any(map(is_data_file, path.iterdir()))), None
        )
        remedy = f"name the folder {inside}" if inside else "name a folder with JSONL, JSON, CSV or Parquet"
        raise InputError(f"{name!r} holds no data file", where=where, remedy=remedy)
    return FileInput(paths, limits, tuple(others))


def _open_saved(path: Path, source: Source, limits: ExampleLimits) -> Input:
    import datasets  # 1 s and 100 MB, for datasets folders and hub ids only

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"not a readable datasets folder: {error}", where=source.path) from error
    return DatasetInput(source.path, _pick_split(loaded, source), limits)


def _pick_split(loaded: object, source: Source) -> _ArrowDataset:
    if not isinstance(loaded, dict):
        return cast(_ArrowDataset, loaded)
    wanted = source.split or "train"
    if wanted not in loaded:
        raise ConfigError(
            f"no split {wanted!r}; there are {', '.join(sorted(loaded))}",
            where=source.path,
            remedy="name one: {path: ..., split: ...}",
        )
    return cast(_ArrowDataset, loaded[wanted])


def _looks_like_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) <= 2 and all(parts) and not name.startswith((".", "~")) and not is_data_file(Path(name))


def _open_hub(source: Source, limits: ExampleLimits) -> Input:
    import datasets  # 1 s and 100 MB, for datasets folders and hub ids only

    try:
        loaded = datasets.load_dataset(source.path, source.name, split=source.split)
    except Exception as error:  # every layer below (hub client, HTTP, builders) raises kinds of its own
        offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE")
        raise ConfigError(
            f"neither a path here nor a dataset that could be loaded from the hub"
            f"{' (offline mode is on)' if offline else ''}: {str(error).splitlines()[0] if str(error) else error!r}",
            where=source.path,
            remedy="check the spelling, the network and HF_TOKEN, or give a local path",
        ) from error
    return DatasetInput(source.path, _pick_split(loaded, source), limits)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
