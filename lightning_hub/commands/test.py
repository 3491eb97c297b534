"""``lightning-hub test``: the same as ``validate``, under the name ``test_loss``."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hub.commands.validate import evaluate_and_print


def main(argv: Sequence[str]) -> int:
    """Print ``test_loss``."""
    return evaluate_and_print("test", argv)
