"""Every kind of file, whole and damaged."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lightning_hub.data.readers.examples import RawExample
from lightning_hub.data.readers.files import read_examples
from lightning_hub.errors import ConfigError

ROWS: list[dict[str, object]] = [
    {"prompt": "a, b", "completion": "c\nd"},
    {"prompt": "ä 漢 \U0001f600", "completion": '"quoted"'},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def _csv(delimiter: str) -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, ["prompt", "completion"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return stream.getvalue().encode()


def _parquet() -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), stream)
    return stream.getvalue()


FILES = {
    "a.jsonl": (LINES, [1, 2]),
    "bom.jsonl": (b"\xef\xbb\xbf" + LINES, [1, 2]),
    "crlf.jsonl": (LINES.replace(b"\n", b"\r\n"), [1, 2]),
    "blank.jsonl": (LINES.replace(b"\n", b"\n\n \n"), [1, 4]),
    "no-end.jsonl": (LINES.rstrip(), [1, 2]),
    "a.jsonl.gz": (gzip.compress(LINES), [1, 2]),
    "a.jsonl.zst": (zstandard.compress(LINES), [1, 2]),
    "two-frames.jsonl.zst": (b"".join(zstandard.compress(part + b"\n") for part in LINES.splitlines()), [1, 2]),
    "a.json": (json.dumps(ROWS, indent=1).encode(), [2, 6]),
    "one-line.json": (json.dumps(ROWS).encode(), [1, 1]),
    "lines.json": (LINES, [1, 2]),
    "a.csv": (_csv(","), [3, 4]),
    "a.tsv": (_csv("\t"), [3, 4]),
    "a.csv.gz": (gzip.compress(_csv(",")), [3, 4]),
    "a.parquet": (_parquet(), [1, 2]),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_gives_the_same_rows_with_their_lines(name: str, tmp_path: Path) -> None:
    content, lines = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    assert list(read_examples(path)) == [RawExample(f"{path}:{n}", row) for n, row in zip(lines, ROWS, strict=True)]


def test_a_text_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one\ntwo\n")
    assert list(read_examples(path)) == [RawExample(f"{path}:1", {"text": "one\ntwo\n"})]


@pytest.mark.fault("F34")
@pytest.mark.parametrize(
    ("name", "content", "line", "said"),
    [
        ("a.jsonl", LINES + b'{"prompt": "cut', 3, "not JSON: Unterminated string"),
        ("a.jsonl", b'{"a": "\x00"}\n', 1, "a NUL byte at byte 8"),
        ("a.jsonl", b'\n{"a": "\xff"}\n', 2, "not UTF-8: invalid start byte at byte 8"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), 1, "UTF-16"),
        ("a.jsonl", b"[1, 2]\n", 1, "an example must be an object, this is a list"),
        ("a.jsonl", b'{"a": "\\ud800"}\n', 1, "half of a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, 1, "nested deeper than 1,000 levels"),
        ("a.jsonl", b"9" * 5000 + b"\n", 1, "not JSON"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-9], 3, "damaged or cut off"),
        ("a.jsonl.gz", b"no gzip", 1, "damaged or cut off"),
        ("a.jsonl.zst", zstandard.compress(LINES * 50)[:-9], 1, "damaged or cut off"),
        ("a.json", b'[{"a": 1},\n {"a": ', 2, "not JSON"),
        ("a.json", b'[{"a": 1}\n{"a": 2}]', 1, "a comma is missing"),
        ("a.csv", b"a,b\n1\n", 2, "1 cells under a header of 2"),
        ("a.csv", b"a,b\n1,\xff\n", 2, "not UTF-8"),
        ("a.csv", b'a,b\n1,"x"y\n', 2, "not CSV"),
        ("a.parquet", b"PAR1 no parquet", 1, "not Parquet"),
        ("a.txt", b"one\ntwo \xff", 2, "not UTF-8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damage_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, line: int, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    problem = next(row for row in read_examples(path) if row.problem)
    assert said in problem.problem
    assert name.endswith(".zst") or problem.where == f"{path}:{line}"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.zst"])
def test_an_empty_file_has_no_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert [row for row in read_examples(tmp_path / name) if not row.problem] == []


def test_an_unknown_suffix_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.jsonl .*\.parquet"):
        read_examples(tmp_path / "rows.xyz")


def damaged(random_: random.Random, content: bytes) -> bytes:
    """One to three random injuries."""
    for _ in range(random_.randint(1, 3)):
        at = random_.randrange(len(content) + 1)
        junk = random_.choice(
            [
                b"\x00",
                b"\xff\xfe",
                b"\xef\xbb\xbf",
                b"\r\n",
                b"{",
                b"]",
                b'"',
                b"\\ud83d",
                b"null",
                b"\x1b[31m",
                b"1e999",
            ]
        )
        match random_.randrange(4):
            case 0:
                content = content[:at]
            case 1:
                content = content[:at] + junk + content[at:]
            case 2:
                content = content[:at] + random_.randbytes(random_.randrange(9)) + content[at + 1 :]
            case _:
                content = content[at:] + content[:at]
    return content


@pytest.mark.fault("F34")
@pytest.mark.parametrize("name", FILES)
def test_no_damage_raises(name: str, tmp_path: Path) -> None:
    random_ = random.Random(name)
    path = tmp_path / name
    for _ in range(100):
        path.write_bytes(damaged(random_, FILES[name][0]))
        for row in read_examples(path):
            assert row.where.startswith(f"{path}:")
            assert row.problem or isinstance(row.data, dict)


@given(st.binary(max_size=200))
def test_any_bytes_are_rows_or_problems(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    for name in ("a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.jsonl.zst"):
        (folder / name).write_bytes(content)
        assert all(row.problem or isinstance(row.data, dict) for row in read_examples(folder / name))


@pytest.mark.fault("F34")
def test_a_line_of_50_mb_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * 50_000_000 + b'"}\n{"text": "short"}\n')
    assert [len(str(row.data["text"])) for row in read_examples(path)] == [50_000_000, 5]
