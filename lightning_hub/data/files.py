"""Files to rows: one reader per kind of file, each row with its place, and no damaged file that gives a traceback.

A reader never raises for what is inside a file: what cannot be read becomes a row with a ``problem``.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lightning_hub.data.streams import BROKEN_STREAM, COMPRESSED, numbered_lines, open_stream
from lightning_hub.errors import ConfigError

_BOM = "\ufeff"


@dataclass(slots=True)
class Row:
    """One row as read: where it stands, and its columns or why it has none."""

    where: str
    data: dict[str, object]
    problem: str = ""


def read_rows(path: Path) -> Iterator[Row]:
    """Read a file row by row.

    Args:
        path: JSONL, JSON, CSV, TSV, Parquet or text; all but Parquet also with ``.gz`` or ``.zst``.

    Raises:
        ConfigError: The suffix is none of these.
    """
    return _READERS[kind_of(path)](path)


def kind_of(path: Path) -> str:
    """The suffix that tells how to read a file, compression left out."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind not in _READERS:
        raise ConfigError(
            f"{path.name!r} has no suffix that tells its format",
            where="data.train",
            remedy=f"rename it to end in one of {' '.join(_READERS)}, alone or with {' or '.join(COMPRESSED)}",
        )
    return kind


def is_data_file(path: Path) -> bool:
    """Whether :func:`read_rows` has a reader for this name."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSED]
    return bool(suffixes) and suffixes[-1] in _READERS and not path.name.startswith(".")


def _whole(path: Path) -> tuple[str, Row | None]:
    """The text of a file, or a row with the problem that kept it from being read."""
    try:
        with open_stream(path) as stream:
            raw = stream.read()
    except BROKEN_STREAM as error:
        return "", Row(f"{path}:1", {}, f"the file is damaged or cut off ({error})")
    try:
        return raw.decode("utf-8").removeprefix(_BOM), None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        return "", Row(f"{path}:{line}", {}, _not_utf8(raw[:4], error))


def _not_utf8(head: bytes, error: UnicodeDecodeError) -> str:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "the file is UTF-16, not UTF-8"
    return f"not UTF-8: {error.reason} at byte {error.start + 1} of the line"


def read_jsonl(path: Path) -> Iterator[Row]:
    """One object per line; blank lines are no rows; a byte order mark at the start is skipped."""
    for number, line in numbered_lines(path):
        where = f"{path}:{number}"
        if isinstance(line, str):
            yield Row(where, {}, line)
            continue
        if number == 1:
            line = line.removeprefix(_BOM.encode())
        if not line.isspace() and line:
            yield _parse_line(where, line)


def _parse_line(where: str, line: bytes) -> Row:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Row(where, {}, _not_utf8(line, error))
    except (ValueError, RecursionError) as error:
        return Row(where, {}, _not_json(line, error))
    return _object(where, value, escaped=b"\\u" in line)


def _not_json(line: bytes, error: Exception) -> str:
    if b"\0" in line:
        return f"not JSON: a NUL byte at byte {line.index(0) + 1}"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    return "not JSON: nested too deeply" if isinstance(error, RecursionError) else f"not JSON: {error}"


def _object(where: str, value: object, *, escaped: bool) -> Row:
    """A row from a parsed value; ``escaped`` tells that it may hold half of a surrogate pair."""
    if not isinstance(value, dict):
        return Row(where, {}, f"a row must be an object, this is {_json_type(value)}")
    if escaped and _has_lone_surrogate(value):
        return Row(
            where, {}, "a text holds half of a surrogate pair (\\ud800 to \\udfff), which no tokenizer can encode"
        )
    return Row(where, value)


def _has_lone_surrogate(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _json_type(value: object) -> str:
    names = {list: "a list", str: "a text", type(None): "null", bool: "true or false"}
    return names.get(type(value), "a number")


def read_json(path: Path) -> Iterator[Row]:
    """A list of objects, one object, or lines of objects under the name of ``.json``."""
    text, problem = _whole(path)
    if problem:
        yield problem
        return
    start = len(text) - len(text.lstrip())
    if text.startswith("[", start):
        yield from _array_rows(path, text, start + 1)
    elif start < len(text):
        yield from _value_rows(path, text, start)


def _array_rows(path: Path, text: str, position: int) -> Iterator[Row]:
    """Parse the elements one by one, so that each has its line and a fault does not hide the rows before it."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    while True:
        position = _skip_space(text, position)
        if text.startswith("]", position):
            return
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}"
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield Row(where, {}, _array_fault(text, position, error))
            return
        yield _object(where, value, escaped="\\u" in text[position:end])
        position = _skip_space(text, end)
        if text.startswith(",", position):
            position += 1
        elif not text.startswith("]", position):
            yield Row(where, {}, "not JSON: the list is cut off or a comma is missing after this row")
            return


def _array_fault(text: str, position: int, error: Exception) -> str:
    if position >= len(text):
        return "not JSON: the list is cut off"
    return f"not JSON: {error.msg}" if isinstance(error, json.JSONDecodeError) else _not_json(b"", error)


def _value_rows(path: Path, text: str, position: int) -> Iterator[Row]:
    """One object that fills the file, else one object per line."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, position)
    except (ValueError, RecursionError):
        end = -1
    if end >= 0 and not text[end:].strip():
        yield _object(f"{path}:{text.count(chr(10), 0, position) + 1}", value, escaped="\\u" in text)
    else:
        yield from read_jsonl(path)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def read_csv(path: Path) -> Iterator[Row]:
    """Rows under a header line; a row's place is the line on which it ends."""
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if kind_of(path) == ".tsv" else ","
    number = 0
    try:
        with io.TextIOWrapper(open_stream(path), "utf-8-sig", errors="surrogateescape", newline="") as stream:
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            header = next(reader, [])
            number = reader.line_num
            for cells in reader:
                number = reader.line_num
                if cells:
                    yield _csv_row(f"{path}:{number}", header, cells)
    except csv.Error as error:
        yield Row(f"{path}:{number + 1}", {}, f"not CSV: {error}")
    except BROKEN_STREAM as error:
        yield Row(f"{path}:{number + 1}", {}, f"the file is damaged or cut off ({error})")


def _csv_row(where: str, header: list[str], cells: list[str]) -> Row:
    if len(cells) != len(header):
        return Row(where, {}, f"{len(cells)} cells under a header of {len(header)}")
    data: dict[str, object] = dict(zip(header, cells, strict=True))
    return Row(where, {}, "not UTF-8") if _has_lone_surrogate(data) else Row(where, data)


def read_text(path: Path) -> Iterator[Row]:
    """The whole file as one document: a line end inside a book is no end of text."""
    text, problem = _whole(path)
    if problem or text.strip():
        yield problem or Row(f"{path}:1", {"text": text})


def read_parquet(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file; a row's place is its number, counted from 1."""
    import pyarrow as pa  # 0.2 s and 60 MB, for Parquet only
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for data in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}:{number}", data)
    except (pa.ArrowException, OSError, ValueError) as error:
        yield Row(f"{path}:{number + 1}", {}, f"not Parquet: {str(error).splitlines()[0]}")


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_text,
    ".md": read_text,
}
