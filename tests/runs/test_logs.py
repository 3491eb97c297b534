from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_hub.runs import log_file, logs
from lightning_hub.runs.log_file import LogFile, Tee, log_parts
from lightning_hub.runs.logs import (
    LineIndex,
    LogTail,
    all_lines,
    errors_only,
    last_lines,
    line_time,
    merge_by_time,
    printable,
)

chunks = st.lists(st.binary(max_size=12) | st.sampled_from([b"\n", b"a\n", b"x\r\n", b"\n\n", b"\xff\n"]), max_size=12)


def whole_lines(data: bytes) -> list[bytes]:
    """The slow obvious reader: what stands before each newline."""
    return data.split(b"\n")[:-1]


@given(chunks, st.integers(1, 30))
def test_the_index_reads_the_lines_of_a_growing_file(parts: list[bytes], step: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        index, written, seen = LineIndex(path), b"", 0
        for part in parts:
            written += part
            path.write_bytes(written) if not path.exists() else _append(path, part)
            while new := index.refresh(max_bytes=step):
                seen += new
            while index._scanned < len(written):
                seen += index.refresh(max_bytes=step)
            expected = whole_lines(written)
            assert (len(index), seen) == (len(expected), len(expected))
            assert index.read(0, len(index)) == expected if expected else True
            assert index.size == written.rfind(b"\n") + 1


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


@given(st.lists(chunks, min_size=1, max_size=4), st.integers(1, 9))
def test_tail_last_and_all_lines_agree_with_the_slow_reader(parts: list[list[bytes]], count: int) -> None:
    """Parts of a rotated log, each growing in pieces; a tail follows over all of them."""
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "stdout.log"
        tail, followed, expected = LogTail(first), [], []
        for number, pieces in enumerate(parts):
            path = first if not number else first.with_name(f"stdout.log.{number}")
            for piece in pieces:
                _append(path, piece)
                followed += tail.read()
            path.touch()
            expected += whole_lines(path.read_bytes())
        followed += tail.read()
        assert followed == expected
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(logs, "_CHUNK", 4)
            end = LogTail.at_end(first)
            assert last_lines(end, count) == expected[-count:]
        assert list(all_lines(end)) == expected
        assert end.read() == []


@pytest.mark.fault("F39")
@given(st.lists(st.text(max_size=20).map(lambda text: text.replace("\r", "")), max_size=20))
def test_every_full_line_that_is_printed_is_in_the_file(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "log"
        log = LogFile(first, _fail)
        for text in texts:
            log.write(text)
        whole = "".join(texts).rpartition("\n")
        assert first.read_bytes() == (whole[0] + whole[1]).encode("utf-8", "backslashreplace")
        log.close()
        assert first.read_bytes().endswith(b"\n") == bool("".join(texts))


def _fail(error: OSError) -> None:
    raise AssertionError(error)


@pytest.mark.fault("F40")
@settings(max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=80))
def test_rotation_keeps_the_beginning_and_the_newest_part(lengths: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(log_file, "FIRST_PART", 100)
        patch.setattr(log_file, "LATER_PART", 200)
        first = Path(folder) / "log"
        log = LogFile(first, _fail)
        lines = [f"{number:03d}" + "x" * length for number, length in enumerate(lengths)]
        for line in lines:
            log.write(line + "\n")
        log.close()
        assert sum(part.stat().st_size for part in log_parts(first)) <= 100 + log_file.KEPT_PARTS * 200
        kept = [line.decode() for part in log_parts(first) for line in whole_lines(part.read_bytes())]
        head = whole_lines(first.read_bytes())
        assert kept[: len(head)] == lines[: len(head)]
        assert kept[len(head) :] == lines[len(lines) - len(kept) + len(head) :]
        assert len(kept) == len(lines) or len(kept) > len(head)


def test_a_new_process_continues_in_the_newest_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "FIRST_PART", 10)
    for word in ("one", "two", "three"):
        log = LogFile(tmp_path / "log", _fail)
        log.write(f"{word}-{word}\n")
        log.close()
    assert [part.name for part in log_parts(tmp_path / "log")] == ["log", "log.1"]
    assert (tmp_path / "log.1").read_text() == "two-two\nthree-three\n"


def test_a_tail_counts_parts_that_were_rotated_away_unread(tmp_path: Path) -> None:
    first = tmp_path / "log"
    first.write_text("a\n")
    tail = LogTail(first)
    assert tail.read() == [b"a"]
    (tmp_path / "log.3").write_text("d\n")
    assert (tail.read(), tail.lost) == ([b"d"], 2)


def test_a_progress_bar_leaves_its_last_state(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log", _fail)
    for text in ("10%\r", "20%\r", "30%", "\r\n", "done\r\n", "a\rb\r", "c", "\nlast"):
        log.write(text)
    log.close()
    assert (tmp_path / "log").read_text() == "30%\ndone\nc\nlast\n"


def test_a_tee_is_the_stream_and_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = LogFile(tmp_path / "log", _fail)
    tee = Tee(sys.stdout, log)
    print("hello", file=tee)
    tee.writelines(["a\n", "b\n"])
    assert tee.isatty() is False  # type: ignore[operator]  # the stream's own method
    log.close()
    assert capsys.readouterr().out == (tmp_path / "log").read_text() == "hello\na\nb\n"


@pytest.mark.security("S14")
@given(st.binary(max_size=200), st.integers(1, 50))
def test_no_byte_of_a_log_reaches_the_terminal_as_a_command(line: bytes, limit: int) -> None:
    shown = printable(line, limit)
    assert [char for char in shown if not (char.isprintable() or char == "\t" or char.isspace())] == []
    assert not set(shown) & set("\x1b\r\n\x07\x08\x9b")


@pytest.mark.security("S14")
@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (b"\x1b]52;c;aGk=\x07", "\\x1b]52;c;aGk=\\x07"),
        (b"\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        (b"[red]markup[/red]", "[red]markup[/red]"),
        (b"caf\xc3\xa9 \xff", "caf\u00e9 \\xff"),
        (b"10%\r50%\r\n", "50%"),
        ("\u202eevil".encode(), "\\u202eevil"),
        ("\u0085\u2028".encode(), "\\x85\\u2028"),
    ],
)
def test_log_text_is_data(line: bytes, shown: str) -> None:
    assert printable(line) == shown


def test_a_line_of_a_megabyte_is_cut_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x" * 1_000_000 + b"\nend\n")
    assert printable(path.read_bytes().split(b"\n")[0]).endswith("(995904 more characters)")
    index = LineIndex(path)
    index.refresh()
    assert [len(line) for line in index.read(0, 2)] == [4 * 4096, 3]
    assert last_lines(LogTail.at_end(path), 1) == [b"end"]


def test_a_truncated_or_replaced_file_is_indexed_again(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("a\nb\nc\n")
    index = LineIndex(path)
    assert index.refresh() == 3
    path.write_text("d\n")
    assert (index.refresh(), index.read(0, 9)) == (1, [b"d"])
    other = tmp_path / "other"
    other.write_text("e\nf\n")
    other.replace(path)
    assert (index.refresh(), index.read(0, 9)) == (2, [b"e", b"f"])


def test_the_last_page_of_a_large_log_reads_only_its_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file:
        file.truncate(1 << 33)  # 8 GB of holes: reading them all would take many seconds
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + b"line\n" * 50)
    began = time.process_time()
    assert last_lines(LogTail.at_end(path), 50) == [b"line"] * 50
    assert time.process_time() - began < 0.5


TRACE = [
    "2026-01-01T00:00:01 start",
    "Traceback (most recent call last):",
    '  File "a.py", line 1, in <module>',
    "    boom()",
    "ValueError: bad",
    "step 3",
    "RuntimeError: late",
    "loss 0.1",
]


def test_errors_only_keeps_complete_tracebacks() -> None:
    assert list(errors_only(TRACE)) == [*TRACE[1:5], TRACE[6]]


@given(st.lists(st.lists(st.integers(0, 59) | st.none(), max_size=8), min_size=1, max_size=4))
def test_merging_keeps_each_log_in_order_and_times_never_fall(logs: list[list[int | None]]) -> None:
    texts = [
        (f"r{rank}", [_line(rank, place, second) for place, second in enumerate(seconds)])
        for rank, seconds in enumerate(logs)
    ]
    merged = list(merge_by_time(texts))
    for name, lines in texts:
        assert [line.text for line in merged if line.source == name] == lines
    own_order = [[second for second in seconds if second is not None] for seconds in logs]
    if all(seconds == sorted(seconds) for seconds in own_order):
        times = [time for line in merged if (time := line_time(line.text)) is not None]
        assert times == sorted(times)


def _line(rank: int, place: int, second: int | None) -> str:
    return f"rank {rank} line {place}" if second is None else f"2026-01-01 00:00:{second:02d} rank {rank} line {place}"


@pytest.mark.parametrize(
    ("line", "time"),
    [
        ("2026-01-01T00:00:01Z x", 1767225601.0),
        ("[2026-01-01 01:00:01.500+01:00] x", 1767225601.5),
        ("2026-13-99 99:99:99 x", None),
        ("step 3", None),
    ],
)
def test_times_at_the_beginning_of_lines(line: str, time: float | None) -> None:
    assert line_time(line) == time


@pytest.mark.fault("F19")
def test_a_full_disk_is_reported_and_incomplete_lines_do_not_affect_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_some: Callable[[int], Callable[[int, bytes], int]]
) -> None:
    told: list[OSError] = []
    log = LogFile(tmp_path / "log", told.append)
    log.write("first\n")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_some(3))
        log.write("second\n")
    log.write("third\n")
    log.close()
    assert len(told) == 1
    assert (tmp_path / "log").read_text().split("\n") == ["first", "sec", "third", ""]
