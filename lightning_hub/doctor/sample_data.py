"""The chats that proofs train on; made here, where nothing heavy is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_hub.demo.tasks import REVERSE, SHOUT, SPELL, conversations

ROWS = "rows.jsonl"
"""Their file in the folder of a proof."""

CHATS = 42
"""Five steps of eight uneven samples, and a partial one of two: one row, so that a rank has nothing of its own."""


def write_chats(folder: Path) -> None:
    """Write them, one JSON object a line."""
    talks = conversations((SPELL, REVERSE, SHOUT), CHATS, seed=3)
    (folder / ROWS).write_text("".join(json.dumps(talk) + "\n" for talk in talks), encoding="utf-8")
