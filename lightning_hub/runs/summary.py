"""The last lines of a run: steps, losses, memory, time of each phase, and the path of the result."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence

from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.metrics import Line, as_number, read_metrics


def run_summary(folder: RunFolder, seconds: Mapping[str, float], *, memory_gb: float | None = None) -> list[str]:
    """Return the lines that a finished run prints last.

    Args:
        folder: The run, with its metrics written.
        seconds: The seconds of each phase of this attempt, by name.
        memory_gb: Peak memory of the process in GB; used if no memory of a device was measured.
    """
    lines = read_metrics(folder)
    rates = _series(lines, "tokens_per_second")
    rate = f", {statistics.median(rates):,.0f} tokens/s" if rates else ""
    steps = lines[-1]["step"] if lines else 0
    found = [f"done   {steps:,} steps, {_duration(sum(seconds.values()))} in all{rate}"]
    for name in ("loss", "val_loss"):
        found += _trend(lines, name)
    peak = max(_series(lines, "memory_gb"), default=None)
    if peak is not None or memory_gb is not None:
        where = "of a device" if peak is not None else "of the process"
        found.append(f"memory {peak if peak is not None else memory_gb:.1f} GB at the peak, {where}")
    mfu = _series(lines, "mfu")
    if mfu:
        found.append(f"mfu    {statistics.median(mfu):.1%}")
    found.append("time   " + ", ".join(f"{name} {_duration(took)}" for name, took in seconds.items() if took >= 0.05))
    found.append(f"run    {folder.path}")
    name = shlex.quote(folder.id)
    if folder.export.is_dir():
        found.append(f"export {folder.export}")
        found.append(f"next   lightning-hub chat {name}")
    found.append(f"       lightning-hub runs show {name}")
    return found


def _trend(lines: Sequence[Line], name: str) -> list[str]:
    """Return a line about a metric: the first and last value, and the best value if it is different."""
    values = [(line["step"], value) for line in lines if (value := as_number(line.get(name))) is not None]
    if not values:
        return []
    first, last, best = values[0][1], values[-1][1], min(values, key=lambda pair: pair[1])
    course = f"{first:.4f} -> {last:.4f}" if len(values) > 1 else f"{last:.4f}"
    note = f" (best {best[1]:.4f} after step {best[0]})" if name == "val_loss" and best[1] < last else ""
    return [f"{name.removesuffix('_loss'):<6} {course}{note}"]


def _series(lines: Sequence[Line], name: str) -> list[float]:
    values = (as_number(line.get(name)) for line in lines)
    return [value for value in values if value is not None]


def _duration(seconds: float) -> str:
    """Return a duration as text: ``0.4 s``, ``12 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
