"""No file can take the memory or the stack of the process: what is too large or too deep is refused at its place."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lightning_hub.data.prepare import prepare
from lightning_hub.data.readers import limits
from lightning_hub.data.readers.files import read_examples
from lightning_hub.data.readers.limits import ExampleLimits
from lightning_hub.data.settings import DataSettings
from lightning_hub.errors import DataError
from tests.data.template_families import TEMPLATES, make_tokenizer

SMALL = ExampleLimits(max_bytes=4_000_000, max_depth=1_000)
GOOD = {"text": "the fox"}
_LINE = json.dumps(GOOD).encode() + b"\n"


def bomb(before: bytes, after: bytes = b"", times: int = 50, piece: bytes = b"a" * 4_000_000) -> bytes:
    """A gzip file of a few kilobytes that unpacks to 40 MB."""
    return gzip.compress(before) + gzip.compress(piece) * times + gzip.compress(after)


def zstd_bomb(before: bytes, after: bytes) -> bytes:
    piece = zstandard.compress(b"a" * 4_000_000)
    return zstandard.compress(before) + piece * 50 + zstandard.compress(after)


BOMBS: dict[str, tuple[Callable[[], bytes], int, int]] = {
    "a.jsonl.gz": (lambda: bomb(_LINE + b'{"text": "', b'"}\n' + _LINE), 2, 1),
    "end.jsonl.gz": (lambda: bomb(_LINE + b'{"text": "'), 2, 1),
    "a.jsonl.zst": (lambda: zstd_bomb(_LINE + b'{"text": "', b'"}\n'), 2, 1),
    "brackets.jsonl.gz": (lambda: bomb(_LINE, piece=b"[" * 4_000_000), 2, 1),
    "a.json.gz": (lambda: bomb(b"[" + _LINE + b', {"text": "', b'"}]'), 2, 1),
    "brackets.json.gz": (lambda: bomb(b"[" + _LINE + b",", piece=b"[" * 4_000_000), 2, 1),
    "numbers.json.gz": (lambda: bomb(b"[" + _LINE + b", [1", piece=b",1" * 2_000_000), 2, 1),
    "one.json.gz": (lambda: bomb(b'{"text": "', b'"}'), 1, 0),
    "spaces.json.gz": (lambda: bomb(b"[" + _LINE, b"]", 20, b" " * 4_000_000), 0, 1),
    "a.csv.gz": (lambda: bomb(b"text\nthe fox\n"), 3, 1),
    "quoted.csv.gz": (lambda: bomb(b'text\nthe fox\n"', piece=b"a\n" * 2_000_000), 3, 1),
    "cells.csv.gz": (lambda: bomb(b"text\nthe fox\n", piece=b"," * 4_000_000), 3, 1),
    "header.csv.gz": (lambda: bomb(b"text", piece=b"," * 4_000_000), 1, 0),
    "a.txt.gz": (lambda: bomb(b"the fox "), 1, 0),
    "a.md.zst": (lambda: zstd_bomb(b"the fox ", b""), 1, 0),
}

_MEASURE = """
import json, sys, resource
from pathlib import Path
from lightning_hub.data.readers import limits
from lightning_hub.data.readers.files import read_examples
from lightning_hub.data.readers.limits import ExampleLimits
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = [(row.where, row.problem, bool(row.data)) for row in read_examples(Path(sys.argv[1]), ExampleLimits(4_000_000))]
print(json.dumps([rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""


def measured(path: Path) -> tuple[list[tuple[str, str, bool]], float]:
    """The rows of a file, read in a process of its own, and by how many megabytes that process grew."""
    done = subprocess.run([sys.executable, "-c", _MEASURE, path], capture_output=True, text=True, check=True)
    rows, kilobytes = json.loads(done.stdout)
    return rows, kilobytes / 1000


@pytest.mark.slow
@pytest.mark.fault("F34")
@pytest.mark.parametrize("name", BOMBS)
def test_a_file_that_unpacks_to_much_is_refused_at_the_bound(name: str, tmp_path: Path) -> None:
    make, line, good = BOMBS[name]
    path = tmp_path / name
    path.write_bytes(make())
    assert path.stat().st_size < 600_000
    rows, megabytes = measured(path)
    problems = [(where, problem) for where, problem, _ in rows if problem]
    assert megabytes < 100
    assert sum(has_data for _, _, has_data in rows) >= good
    if line:
        where, problem = problems[0]
        assert where == f"{path}:{line}"
        assert "max_example_mb" in problem or "max_example_depth" in problem or "10,000 are allowed" in problem
    else:
        assert not problems


def test_a_long_line_is_skipped_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(_LINE + b'{"text": "' + b"x" * 9_000_000 + b'"}\n' + _LINE)
    rows = list(read_examples(path, SMALL))
    assert [bool(row.problem) for row in rows] == [False, True, False]
    assert rows[2].where == f"{path}:3"
    tokenizer = make_tokenizer((TEMPLATES / "chatml.jinja").read_text(encoding="utf-8"))
    with pytest.raises(
        DataError, match=r"a\.jsonl:2: the line is larger than 4 MB \(data\.init_args\.max_example_mb\)"
    ):
        prepare(DataSettings(str(path), max_example_mb=4), tokenizer, cache_dir=tmp_path / "cache")
    skip = DataSettings(str(path), max_example_mb=4, on_bad="skip")
    report = prepare(skip, tokenizer, cache_dir=tmp_path / "cache").report
    assert (report.rows_read, report.rows_kept, report.dropped) == (3, 2, {"unreadable": 1})


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(("depth", "fine"), [(999, True), (1000, False), (30_000, False)])
def test_the_depth_is_bounded(name: str, depth: int, fine: bool, tmp_path: Path) -> None:
    deep = "[" * depth + "]" * depth
    path = tmp_path / name
    row = f'{{"text": "x [{{", "deep": {deep}}}'
    path.write_text(f"[{row}]" if name == "a.json" else row)
    (found,) = read_examples(path, SMALL)
    assert bool(found.data) == fine
    assert fine or "1,000 levels" in found.problem


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_the_number_of_values_is_bounded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_VALUES", 50_000)
    path = tmp_path / name
    row = '{"text": "x", "many": [' + "[]," * (2 * 50_000) + "[]]}"
    path.write_text(f"[{row}]" if name == "a.json" else row)
    (found,) = read_examples(path)
    assert "more than 50,000 texts, lists and objects" in found.problem
    path.write_text(json.dumps([{"text": "[{" * 3_000_000}])[1:-1])
    assert [len(str(row.data["text"])) for row in read_examples(path)] == [6_000_000]


def test_lists_larger_than_a_chunk_are_read_as_by_the_library(tmp_path: Path) -> None:
    rows = [{"text": "ä漢\U0001f600\n" * (n % 97) * 40, "n": n} for n in range(700)]
    rows[300]["text"] = "x" * 3_000_000
    text = json.dumps(rows, indent=1, ensure_ascii=False)
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    found = list(read_examples(path, SMALL))
    assert [row.data for row in found] == json.loads(text)
    lines = text.split("\n")
    assert all(lines[int(row.where.rpartition(":")[2]) - 1] == " {" for row in found)
    path.write_text(text.replace('"n": 650', '"n": x'), encoding="utf-8")
    *_, last = read_examples(path, SMALL)
    assert "not JSON: Expecting value" in last.problem
    path.write_bytes(text.encode().replace(b'"n": 650', b'"\xff": 1'))
    *_, last = read_examples(path, SMALL)
    assert "not UTF-8: invalid start byte" in last.problem
    assert b"\xff" in path.read_bytes().split(b"\n")[int(last.where.rpartition(":")[2]) - 1]


def test_cells_of_parquet_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = ["the fox", "a" * 9_000_000, "b"]
    pq.write_table(pa.table({"text": texts}), path, compression="none")
    rows = list(read_examples(path, SMALL))
    assert [bool(row.problem) for row in rows] == [False, True, False]
    assert "larger than 4 MB" in rows[1].problem
    assert rows[1].where == f"{path}:2"
    pq.write_table(pa.table({"text": ["a" * 40_000_000]}), path, compression="zstd", use_dictionary=False)
    (row,) = read_examples(path, SMALL)
    assert "unpacks to 40 MB" in row.problem


def test_one_large_entry_named_by_every_row_of_parquet_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    entry = pa.array(["a" * 3_500_000])
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 500, pa.int32()), entry)
    pq.write_table(pa.table({"text": column}), path, compression="none", dictionary_pagesize_limit=10_000_000)
    rows, megabytes = measured(path)
    assert len(rows) == 500
    assert megabytes < 700
