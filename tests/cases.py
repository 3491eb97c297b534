"""Counts the cases of the fault and security tables that the tests hold, for the end of a test run."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from _pytest.terminal import TerminalReporter

CASES = {"fault": [f"F{number}" for number in range(1, 46)], "security": [f"S{number}" for number in range(1, 16)]}
"""Every case of the two tables: processes, data, checkpoints and signals; trust, secrets and permissions."""

PROPERTY = "case"


def note_cases(items: Iterable[pytest.Item]) -> None:
    """Write a test's cases where its report carries them, also from another process."""
    for item in items:
        for kind in CASES:
            item.user_properties += [(PROPERTY, str(mark.args[0])) for mark in item.iter_markers(kind)]


def count_cases(terminal: TerminalReporter) -> list[str]:
    """Return a line for each table: how many cases pass, fail, are skipped, are absent."""
    outcomes: dict[str, set[str]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminal.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", ()):  # a file that could not be collected has none
                if name == PROPERTY:
                    outcomes.setdefault(str(value), set()).add(outcome)
    lines = []
    for kind, cases in CASES.items():
        seen = [outcomes.get(case, set()) for case in cases]
        failing = sum(bool(found & {"failed", "error"}) for found in seen)
        passing = sum("passed" in found and not found & {"failed", "error"} for found in seen)
        skipped = sum(found == {"skipped"} for found in seen)
        absent = sum(not found for found in seen)
        lines.append(f"{kind} cases: {passing} pass, {failing} fail, {skipped} skipped, {absent} absent")
    return lines
