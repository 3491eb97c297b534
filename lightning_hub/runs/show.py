"""Prints runs as text: aligned tables, durations and numbers. There is no markup, so file content cannot inject any."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from datetime import datetime

from lightning_hub.runs.logs import printable
from lightning_hub.runs.metrics import Metric
from lightning_hub.runs.reader import RunView
from lightning_hub.runs.records import Attempt, ErrorRecord

_AGE_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "m"))


def clean(text: object) -> str:
    """Return any value of a file as one line without terminal escape sequences."""
    return printable(str(text).replace("\n", " ").encode("utf-8", "surrogateescape"), limit=400)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows in aligned columns; columns of numbers are aligned right."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(_width(line[column]) for line in lines) for column in range(len(head))]
    right = [all(_is_number(line[column]) for line in lines[1:]) and len(lines) > 1 for column in range(len(head))]
    return "\n".join(
        "  ".join(
            _padded(cell, width, at_right) for cell, width, at_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _padded(cell: str, width: int, at_right: bool) -> str:
    gap = " " * (width - _width(cell))
    return gap + cell if at_right else cell + gap


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or cell[0].isdigit()


def number(value: Metric) -> str:
    """Return a metric with four significant digits."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else clean(value)


def age(seconds: float | None) -> str:
    """Return a duration in its largest unit."""
    if seconds is None:
        return "-"
    for unit, name in _AGE_UNITS:
        if seconds >= unit:
            return f"{seconds / unit:.0f}{name}"
    return f"{seconds:.0f}s"


def state(view: RunView) -> str:
    """Return the state, with a question mark if one more look could change it."""
    return view.verdict.state if view.verdict.sure else f"{view.verdict.state}?"


def progress(view: RunView) -> str:
    """Return the finished steps and, if known, the number of all steps: ``5/100``."""
    return f"{view.step}/{view.status.max_steps}" if view.status.max_steps else str(view.step)


def topology(nodes: int, processes: int) -> str:
    """Return the number of nodes and of processes on each node as text."""
    each = "1 process" if processes == 1 else f"{processes} processes"
    return each if nodes == 1 else f"{nodes} nodes x {each}"


def run_table(views: Iterable[RunView]) -> str:
    """Return the table of ``runs list``."""
    head = ("RUN", "STATE", "METHOD", "MODEL", "STEP", "LOSS", "TOKENS/S", "LAST SIGN")
    rows = [
        (
            clean(view.folder.id),
            state(view),
            clean(view.info.method or "-"),
            clean(view.info.model or "-")[-40:],
            progress(view),
            number(view.loss),
            number(view.tokens_per_second),
            age(view.age),
        )
        for view in views
    ]
    return table(head, rows)


def run_page(view: RunView, attempts: Sequence[Attempt], error: ErrorRecord | None) -> str:
    """Return the text of ``runs show``."""
    facts = [
        ("run", view.folder.id),
        ("path", view.folder.path),
        ("state", state(view) + (f": {clean(view.verdict.reason)}" if view.verdict.reason else "")),
        ("method", view.info.method or "-"),
        ("model", view.info.model or "-"),
        ("step", progress(view)),
        ("loss", number(view.loss)),
        ("tokens/s", number(view.tokens_per_second)),
        ("last sign", age(view.age)),
        ("created", f"{local_time(view.info.created)} (local time)"),
        ("launcher", f"{view.info.launcher}, {topology(view.info.nnodes, view.info.nproc_per_node)}"),
    ]
    if view.note:
        facts.append(("note", view.note))
    if view.status.warning:
        facts.append(("warning", view.status.warning))
    parts = ["\n".join(f"{name:<10} {clean(value)}" for name, value in facts)]
    if view.ranks:
        rows = [
            (str(rank.rank), str(rank.node), rank.state, str(rank.step), rank.phase, age(rank.age), clean(rank.doing))
            for rank in view.ranks
        ]
        parts.append(table(("RANK", "NODE", "STATE", "STEP", "PHASE", "AGE", "DOING"), rows))
    if attempts:
        made = [(str(item.attempt), clean(item.reason), str(item.step), local_time(item.created)) for item in attempts]
        parts.append(table(("ATTEMPT", "WHY", "FROM STEP", "BEGAN"), made))
    if error is not None:
        where = f" ({clean(error.where)})" if error.where else ""
        remedy = f"\n  {clean(error.remedy)}" if error.remedy else ""
        head = f"error on rank {error.rank}, step {error.step}, class {clean(error.kind)}:"
        parts.append(f"{head}\n  {clean(error.type)}: {clean(error.message)}{where}{remedy}")
    return "\n\n".join(parts)


def local_time(text: str) -> str:
    """Return a UTC time of a file in local time, or the text itself if it is not a time."""
    try:
        return f"{datetime.fromisoformat(text).astimezone():%Y-%m-%d %H:%M:%S}"
    except ValueError:
        return clean(text) or "-"
