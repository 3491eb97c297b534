"""One example as a reader gives it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class RawExample:
    """One example as read: its place (``file:line``), and its columns or why it has none."""

    where: str
    data: dict[str, object]
    problem: str = ""


def not_utf8(head: bytes, error: UnicodeDecodeError) -> str:
    """Say what is wrong with bytes that are not UTF-8."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "the file is UTF-16, not UTF-8"
    return f"not UTF-8: {error.reason} at byte {error.start + 1} of the line"
