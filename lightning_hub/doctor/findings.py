"""The result of a check: one line for people, one JSON object for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: What was checked.
        ok: Whether the check passed.
        detail: What was found.
        remedy: What to do; None if there is nothing to do.
    """

    check: str
    ok: bool
    detail: str
    remedy: str | None = None

    def to_json(self) -> dict[str, str | bool | None]:
        """Return the object that ``--json`` prints."""
        return asdict(self)

    def __str__(self) -> str:
        line = f"{'ok  ' if self.ok else 'FAIL'}  {self.check:<40} {self.detail}"
        return line if self.remedy is None else f"{line}; {self.remedy}"


DISTRUST = "do not train here until this check passes: install the pinned packages again with scripts/quickstart"
"""The remedy when numbers are wrong."""


def equality(check: str, error: float, bound: float, of: str) -> Finding:
    """Return the finding of an equality with a tolerance. An error that is NaN fails.

    Args:
        check: The equality.
        error: The difference between the two sides.
        bound: The largest difference that is allowed.
        of: What was compared, and how the error is measured.
    """
    ok = error <= bound
    return Finding(check, ok, f"error {error:.1e}, bound {bound:.0e} ({of})", None if ok else DISTRUST)


def write_findings(findings: list[Finding], path: Path) -> None:
    """Write findings for the parent process."""
    path.write_text(json.dumps([finding.to_json() for finding in findings]), encoding="utf-8")


def read_findings(path: Path) -> list[Finding]:
    """Read what ``write_findings`` wrote."""
    return [Finding(**found) for found in json.loads(path.read_text(encoding="utf-8"))]
