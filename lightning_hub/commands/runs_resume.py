"""``lightning-hub runs resume``: continue a run in the same folder, as a new attempt."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hub.commands.fit import start
from lightning_hub.config.command import parse_command
from lightning_hub.errors import ConfigError
from lightning_hub.launch.messages import print_note
from lightning_hub.launch.options import VALUED, parse
from lightning_hub.launch.resuming import check_work_left, newest_config
from lightning_hub.launch.run_setup import check_and_fill
from lightning_hub.runs.folder import RunFolder


def resume(folder: RunFolder, argv: Sequence[str]) -> int:
    """Resume a run from its newest valid checkpoint.

    Args:
        folder: The run.
        argv: New limits and other overrides, in the form of ``fit``.
    """
    if not folder.config.is_file():
        raise ConfigError("the run has no config.yaml", where=str(folder.path), remedy="start a new run")
    given = ["--config", str(newest_config(folder)), "--run-dir", str(folder.path), "--resume", "must", *argv]
    command, options, _ = parse("runs resume", given)
    config = check_and_fill(command.recipe, options, print_note)
    check_work_left(folder, config)
    if parse_command(argv, valued=VALUED).recipe.tree:
        print_note(f"this attempt runs with {' '.join(argv)}")
    return start(command.recipe, config, options)
