from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hub.runs.files import make_private_folder, write_json
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.metrics import (
    Line,
    MetricsReader,
    MetricsWriter,
    as_number,
    last_values,
    metric_names,
    read_metrics,
    valid_lines,
)
from lightning_hub.runs.records import Attempt


def test_special_numbers_are_text_of_strict_json(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "m", attempt=1)
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1, "e": 3, "f": None}
    writer.write(1, values)
    writer.close()

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    line = json.loads((tmp_path / "m").read_text(), parse_constant=refuse)
    assert {key: as_number(line[key]) for key in "bcde"} == {key: values[key] for key in "bcde"}
    assert math.isnan(as_number(line["a"]) or 0)
    assert as_number(line["f"]) is None
    assert (line["step"], line["attempt"], line["time"][-1]) == (1, 1, "Z")


attempts = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 8)), min_size=1, max_size=4)


def number(line: Line, key: str) -> int:
    return int(str(line[key]))


def naive(lines: list[Line], started: dict[int, int]) -> list[Line]:
    """The rule as the contract words it: of older attempts, a step after the one resumed from does not count."""

    def is_void(line: Line, later: Line) -> bool:
        newer = number(later, "attempt") > number(line, "attempt")
        return newer and number(line, "step") > started[number(later, "attempt")]

    return [line for place, line in enumerate(lines) if not any(is_void(line, later) for later in lines[place + 1 :])]


@given(attempts, st.integers(7, 90))
def test_following_by_offset_equals_reading_the_complete_file(runs: list[tuple[int, int]], piece: int) -> None:
    """Attempts that resume anywhere, read in pieces of any size, lines torn in the middle included."""
    lines: list[Line] = []
    for number, (begin, count) in enumerate(runs, 1):
        lines += [{"step": begin + step, "attempt": number, "loss": 1.0 / number} for step in range(1, count + 1)]
    started = {number: begin for number, (begin, _) in enumerate(runs, 1)}
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        reader = MetricsReader(path, started)
        assert reader.read() is False
        for end in range(piece, len(data) + piece, piece):
            path.write_bytes(data[:end])
            reader.read()
        assert reader.lines == naive(lines, started)


def test_only_complete_lines_count(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b'{"step": 1, "attempt": 1}\nnonsense\n[1]\n{"loss": 1}\n\xff\n{"step": 2, "attempt": 1}')
    reader = MetricsReader(path)
    reader.read()
    assert [line["step"] for line in reader.lines] == [1]
    path.write_bytes(path.read_bytes() + b"\n")
    assert reader.read() is True
    assert [line["step"] for line in reader.lines] == [1, 2]
    path.write_bytes(b'{"step": 9, "attempt": 1}\n')
    reader.read()
    assert [line["step"] for line in reader.lines] == [9]


def test_a_run_that_resumed_reads_as_one_curve(folder: RunFolder) -> None:
    for attempt, begin in ((1, 0), (2, 2)):
        make_private_folder(folder.attempt(attempt))
        write_json(folder.attempt_json(attempt), Attempt(attempt=attempt, step=begin).to_json())
        writer = MetricsWriter(folder.metrics, attempt)
        for step in range(begin + 1, begin + 4):
            writer.write(step, {"loss": attempt * 100 + step, **({"val_loss": 1} if step == 1 else {})})
    lines = read_metrics(folder)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 101), (2, 102), (3, 203), (4, 204), (5, 205)]
    assert metric_names(lines) == ["loss", "val_loss"]
    assert last_values(lines, "loss", "val_loss", "lr") == {"loss": 205, "val_loss": 1, "lr": None}


def test_a_process_of_an_older_attempt_that_still_writes_does_not_count() -> None:
    lines: list[Line] = [{"step": 1, "attempt": 1}, {"step": 2, "attempt": 2}, {"step": 3, "attempt": 1}]
    assert valid_lines(lines, {2: 1}) == lines[:2]


@pytest.mark.parametrize("value", [None, True, "text"])
def test_what_is_not_a_number(value: str | bool | None) -> None:
    assert as_number(value) is None
