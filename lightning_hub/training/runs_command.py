"""``lightning-hub runs``: the light commands, with ``resume`` handed over to training."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning_hub.config.command import parse_command
from lightning_hub.errors import ConfigError
from lightning_hub.runs import commands
from lightning_hub.runs.folder import RunFolder


def main(argv: Sequence[str]) -> int:
    """Run one of the ``runs`` commands; only ``resume`` loads anything heavy."""
    return commands.main(argv, resume=resume)


def resume(folder: RunFolder, argv: Sequence[str]) -> int:
    """Go on with a run in the same folder, from its newest whole checkpoint.

    Args:
        folder: The run.
        argv: New limits and other overrides, in the form of ``fit``.
    """
    if not folder.config.is_file():
        raise ConfigError("the run has no config.yaml", where=str(folder.path), remedy="start a new run")
    from lightning_hub.training.command import checked, start  # 0.1 s: only this verb needs it
    from lightning_hub.training.options import VALUED, parse
    from lightning_hub.training.resuming import check_work_left, newest_config

    given = ["--config", str(newest_config(folder)), "--run-dir", str(folder.path), "--resume", "must", *argv]
    command, options, _ = parse("runs resume", given)
    tree = checked(command.recipe, options)
    check_work_left(folder, tree)
    if parse_command(argv, valued=VALUED).recipe.tree:
        print(f"note: this attempt runs with {' '.join(argv)}", file=sys.stderr)
    return start(command.recipe, tree, options)
