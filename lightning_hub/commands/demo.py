"""``lightning-hub demo``: the main job on the embedded model and data, from chats to an exported model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightning_hub.config.help import plain_text
from lightning_hub.demo.tasks import METHODS
from lightning_hub.launch.arguments import add_runs_root
from lightning_hub.runs.terminal import independent_of_terminal


def main(argv: Sequence[str]) -> int:
    """Fine-tune the embedded model and show what it has learned."""
    parser = argparse.ArgumentParser(prog="lightning-hub demo", description=plain_text(__doc__))
    parser.add_argument(
        "--method", choices=METHODS, help="train a second embedded model with it, and test what that knew before, too"
    )
    add_runs_root(parser)
    given = parser.parse_args(argv)
    from lightning_hub.demo.lesson import demonstrate  # 0.1 s: rich

    with independent_of_terminal():
        return demonstrate(given.method, given.runs_root)
