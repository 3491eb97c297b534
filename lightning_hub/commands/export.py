"""``lightning-hub export``: a run's newest checkpoint as a plain Hugging Face folder, or as an adapter."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from lightning_hub.config.help import plain_text
from lightning_hub.errors import ConfigError, ExitCode
from lightning_hub.launch.arguments import add_runs_root, add_trust_remote_code
from lightning_hub.launch.messages import LOADING, print_notice
from lightning_hub.launch.resuming import newest_recipe
from lightning_hub.launch.topology import single_process
from lightning_hub.runs.folder import find_run, runs_root


def main(argv: Sequence[str]) -> int:
    """Write the export of a run."""
    parser = argparse.ArgumentParser(prog="lightning-hub export", description=plain_text(__doc__))
    parser.add_argument("run", metavar="RUN", help="an id, a unique beginning of one, or a path")
    parser.add_argument("--to", type=Path, help="the folder to write (default: RUN/export, RUN/export-merged)")
    parser.add_argument("--merge", action="store_true", help="merge an adapter into its base: a plain model folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of merged weights (default: the base's own)")
    add_runs_root(parser)
    add_trust_remote_code(parser)
    given = parser.parse_args(argv)
    if given.dtype and not given.merge:
        raise ConfigError("weights that are not merged keep their dtype", where="--dtype", remedy="add --merge")
    folder = find_run(given.run, runs_root(given.runs_root))
    if given.to:
        _check_free(given.to)
    config = newest_recipe(folder)
    config = single_process(config)
    print_notice(LOADING)
    from lightning_hub.training.run import export  # 4 s: torch, lightning and transformers

    target = given.to or (folder.export_merged if given.merge else folder.export)
    allowed = given.trust_remote_code
    said = export(config, folder, target, merge=given.merge, dtype=given.dtype, trust_remote_code=allowed)
    print(f"{said}\n{target}" if said else target)
    return ExitCode.DONE


def _check_free(target: Path) -> None:
    """Refuse a path that exists: it may be a model, data, or a home folder.

    Raises:
        ConfigError: The path is taken, or cannot be written.
    """
    there = next(path for path in (target, *target.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK) or (there != target and not there.is_dir()):
        raise ConfigError(f"{there} is not a folder that can be written", where="--to", remedy="name another")
    if there == target and (not target.is_dir() or next(target.iterdir(), None) is not None):
        remedy = "name a new folder, or remove this one first"
        raise ConfigError(f"{target} is there already, and nothing is written over it", where="--to", remedy=remedy)
