"""The conversations that proofs train on; written in the main process, which has no heavy imports."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_hub.demo.tasks import REVERSE, SHOUT, SPELL, conversations

ROWS = "rows.jsonl"
"""The file of the conversations in the folder of a proof."""

CHATS = 42
"""Number of conversations: five steps of eight samples with different lengths, and a last step of two.

The last step is one packed row, so one of two ranks has no data in it.
"""


def write_chats(folder: Path) -> None:
    """Write the conversations, one JSON object in each line."""
    talks = conversations((SPELL, REVERSE, SHOUT), CHATS, seed=3)
    (folder / ROWS).write_text("".join(json.dumps(talk) + "\n" for talk in talks), encoding="utf-8")
