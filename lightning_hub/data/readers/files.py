"""Files to raw examples: one reader for each kind of file.

A reader never raises for the content of a file: what cannot be read becomes an example with a ``problem``.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from lightning_hub.data.readers.columnar import read_parquet
from lightning_hub.data.readers.examples import RawExample, not_utf8
from lightning_hub.data.readers.json_files import has_lone_surrogate, read_json_examples, read_jsonl
from lightning_hub.data.readers.limits import ExampleLimits, TooLargeError
from lightning_hub.data.readers.streams import BROKEN_STREAM, COMPRESSED, open_stream
from lightning_hub.data.settings import TRAIN_KEY, InputError

_BOM = "\ufeff"


def read_examples(path: Path, limits: ExampleLimits | None = None) -> Iterator[RawExample]:
    """Read a file, one example at a time.

    Args:
        path: JSONL, JSON, CSV, TSV, Parquet or text; all but Parquet also with ``.gz`` or ``.zst``.
        limits: How large and deep an example may be; a larger one becomes an example with a problem.

    Raises:
        InputError: The suffix is another one.
    """
    return _READERS[kind_of(path)](path, limits or ExampleLimits())


def kind_of(path: Path, where: str = TRAIN_KEY) -> str:
    """The suffix that decides how a file is read, without that of the compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind not in _READERS:
        raise InputError(
            f"{path.name!r} has no suffix of a known format",
            where=where,
            remedy=f"rename it to end in one of {' '.join(_READERS)}, alone or with {' or '.join(COMPRESSED)}",
        )
    return kind


_ABOUT_DATA = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|contributing|code_of_conduct|authors|data_?card|"
    r"dataset_?card|dataset_?infos?|dataset_dict|state|croissant|data_report)([._-].*)?",
    re.IGNORECASE,
)
"""Names of files that describe data."""


def is_data_file(path: Path) -> bool:
    """Whether :func:`read_examples` has a reader for this name, and the name is not that of a description."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSED]
    readable = bool(suffixes) and suffixes[-1] in _READERS
    about = _ABOUT_DATA.fullmatch(path.name) and not path.name.lower().endswith((".jsonl", ".parquet", ".csv", ".tsv"))
    return readable and not path.name.startswith((".", "_")) and not about


MAX_COLUMNS = 10_000
"""The most columns of a CSV file."""


def read_csv(path: Path, limits: ExampleLimits) -> Iterator[RawExample]:
    """The records under a header line; the place of a record is the line on which it ends."""
    csv.field_size_limit(limits.max_bytes)
    delimiter = "\t" if kind_of(path) == ".tsv" else ","
    number = 0
    try:
        with io.TextIOWrapper(open_stream(path), "utf-8-sig", errors="surrogateescape", newline="") as stream:
            lines = _BoundedLines(stream, limits)
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            header = next(reader, [])
            number = reader.line_num
            if len(header) > MAX_COLUMNS:
                yield RawExample(
                    f"{path}:{number}", {}, f"a header of {len(header):,} columns; {MAX_COLUMNS:,} are allowed"
                )
                return
            lines.read = 0
            for cells in reader:
                number = reader.line_num
                lines.read = 0
                if cells:
                    yield _csv_example(f"{path}:{number}", header, cells)
    except TooLargeError as error:
        yield RawExample(f"{path}:{number + 1}", {}, f"the record is {error}; the rest of the file is not read")
    except csv.Error as error:
        yield RawExample(f"{path}:{number + 1}", {}, f"not CSV: {error}")
    except BROKEN_STREAM as error:
        yield RawExample(f"{path}:{number + 1}", {}, f"the file is damaged or cut off ({error})")


class _BoundedLines:
    """The lines of a text; an error if those of one record are too large together.

    Attributes:
        read: Characters since the last record; the reader of the records sets it to 0.
    """

    def __init__(self, stream: TextIO, limits: ExampleLimits) -> None:
        self.stream = stream
        self.limits = limits
        self.read = 0

    def __iter__(self) -> _BoundedLines:
        return self

    def __next__(self) -> str:
        line = self.stream.readline(self.limits.max_bytes + 1)
        self.read += len(line)
        if self.read > self.limits.max_bytes:
            raise TooLargeError(self.limits.too_large)
        if not line:
            raise StopIteration
        return line


def _csv_example(where: str, header: list[str], cells: list[str]) -> RawExample:
    if len(cells) != len(header):
        return RawExample(where, {}, f"{len(cells)} cells under a header of {len(header)}")
    data: dict[str, object] = dict(zip(header, cells, strict=True))
    return RawExample(where, {}, "not UTF-8") if any(map(has_lone_surrogate, cells)) else RawExample(where, data)


def read_text_examples(path: Path, limits: ExampleLimits) -> Iterator[RawExample]:
    """The complete file as one document: a line end inside a book does not end the text."""
    try:
        with open_stream(path) as stream:
            raw = stream.read(limits.max_bytes + 1)
    except BROKEN_STREAM as error:
        yield RawExample(f"{path}:1", {}, f"the file is damaged or cut off ({error})")
        return
    if len(raw) > limits.max_bytes:
        yield RawExample(f"{path}:1", {}, f"the document is {limits.too_large}")
        return
    try:
        text = raw.decode("utf-8").removeprefix(_BOM)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield RawExample(f"{path}:{line}", {}, not_utf8(raw[:4], error))
        return
    if text.strip():
        yield RawExample(f"{path}:1", {"text": text})


_READERS: dict[str, Callable[[Path, ExampleLimits], Iterator[RawExample]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json_examples,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_text_examples,
    ".md": read_text_examples,
}
