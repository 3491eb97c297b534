"""``metrics.jsonl``: one JSON object for each logged step; written by rank 0, read by any process."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from lightning_hub.runs.files import LineFile, read_json
from lightning_hub.runs.folder import RunFolder, now
from lightning_hub.runs.records import Attempt

Metric: TypeAlias = "float | int | str | None"
Line: TypeAlias = "dict[str, Metric]"

_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_FIXED = ("step", "time", "attempt")


def to_json_number(value: float | int | None) -> Metric:
    """Return a number as a value of strict JSON: NaN and the infinities as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def as_number(value: Metric) -> float | None:
    """Return a metric as a number, or None if it is not a number."""
    if isinstance(value, str):
        return _SPECIAL.get(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


class MetricsWriter:
    """Appends the lines of one attempt."""

    def __init__(self, path: Path, attempt: int) -> None:
        self._file = LineFile(path)
        self._attempt = attempt

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Append one line.

        Raises:
            OSError: The line could not be written; the next line is not affected.
        """
        line = {"step": step, "time": now(), "attempt": self._attempt}
        self._file.append(json.dumps(line | {name: to_json_number(value) for name, value in values.items()}))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def valid_lines(lines: Iterable[Line], started: Mapping[int, int]) -> list[Line]:
    """Return the valid lines: a resumed attempt replaces the lines of earlier attempts after its first step.

    Args:
        lines: In the order of the file.
        started: Step from which each attempt resumed; if it is unknown, it comes from the attempt's first line.
    """
    kept: list[Line] = []
    newest = 0
    for line in lines:
        attempt = _number(line, "attempt")
        if attempt > newest:
            resumed = started.get(attempt, _number(line, "step") - 1)
            kept = [before for before in kept if _number(before, "step") <= resumed]
            newest = attempt
        if attempt == newest:
            kept.append(line)
    return kept


@dataclass
class MetricsReader:
    """Follows a metrics file by its byte offset: each call of ``read`` reads only what was added since the last call.

    Attributes:
        path: The file; it may not exist yet.
        started: Step from which each attempt resumed, if known (``Attempt.step``).
        lines: The valid lines; ``read`` updates them.
    """

    path: Path
    started: Mapping[int, int] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    _offset: int = 0

    def read(self) -> bool:
        """Read the added lines; return whether there were any."""
        fresh = [line for line in map(parse_line, self._new_lines()) if line is not None]
        newest = max((_number(line, "attempt") for line in self.lines[-1:]), default=0)
        if all(_number(line, "attempt") == newest for line in fresh):
            self.lines += fresh
        else:
            self.lines = valid_lines([*self.lines, *fresh], self.started)
        return bool(fresh)

    def _new_lines(self) -> list[bytes]:
        try:
            with self.path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._offset:  # the file was replaced: start again
                    self._offset, self.lines = 0, []
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        end = data.rfind(b"\n") + 1
        self._offset += end
        return data[:end].split(b"\n")[:-1]


def parse_line(text: bytes) -> Line | None:
    """Return the object of one line, or None if the line is incomplete or not a line of metrics."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("step"), int) else None


def _number(line: Line, key: str) -> int:
    value = line.get(key)
    return value if isinstance(value, int) else 0


def read_metrics(folder: RunFolder) -> list[Line]:
    """Return all valid lines of a run."""
    reader = MetricsReader(folder.metrics, resumed_steps(folder))
    reader.read()
    return reader.lines


def resumed_steps(folder: RunFolder) -> dict[int, int]:
    """Return the step from which each attempt resumed."""
    records = {number: read_json(folder.attempt_json(number)) for number in folder.attempts()}
    return {number: Attempt.from_json(record).step for number, record in records.items() if record is not None}


def last_values(lines: Iterable[Line], *names: str) -> dict[str, Metric]:
    """Return the newest value of each named metric, or None if it was never logged."""
    found: dict[str, Metric] = dict.fromkeys(names)
    for line in lines:
        found.update({name: line[name] for name in names if name in line})
    return found


def metric_names(lines: Iterable[Line]) -> list[str]:
    """Return the names of all metrics, in the order of their first line."""
    return [name for name in dict.fromkeys(name for line in lines for name in line) if name not in _FIXED]
