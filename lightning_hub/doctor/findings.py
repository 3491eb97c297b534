"""What a check has found: one line for people, one object for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """The answer of one check.

    Attributes:
        check: What was looked at.
        ok: Whether it is as it should be.
        detail: What was found.
        remedy: What to do about it; None where nothing need be done.
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


DISTRUST = "do not train here before this passes: install the pinned packages anew with scripts/quickstart"
"""What to do when numbers are wrong: nothing less will help."""


def equality(check: str, error: float, bound: float, of: str) -> Finding:
    """Return the finding of an equality that may be off by a bound; an error that is no number fails.

    Args:
        check: The equality.
        error: How far the two sides are apart.
        bound: How far they may be.
        of: What was compared, and how the error is measured.
    """
    ok = error <= bound
    return Finding(check, ok, f"error {error:.1e}, bound {bound:.0e} ({of})", None if ok else DISTRUST)


def write_findings(findings: list[Finding], path: Path) -> None:
    """Write findings for the process that asked for them."""
    path.write_text(json.dumps([finding.to_json() for finding in findings]), encoding="utf-8")


def read_findings(path: Path) -> list[Finding]:
    """Read what ``write_findings`` wrote."""
    return [Finding(**found) for found in json.loads(path.read_text(encoding="utf-8"))]
