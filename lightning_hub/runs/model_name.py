"""Finds the model for a name that a user gave."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning_hub.errors import ConfigError
from lightning_hub.runs.folder import EMBEDDED_MODEL, find_run, runs_root


def model_of(name: str, root: str | None) -> str:
    """Return the model of a name: a model folder, the embedded model, the export of a run, or a hub id.

    A run is given by its path, its id or a unique beginning of its id. For a beginning, the complete id is printed.

    Raises:
        ConfigError: The name matches nothing, or the run has no export.
    """
    if any((Path(name) / file).is_file() for file in ("config.json", "adapter_config.json")):
        return name
    try:
        folder = find_run(name, runs_root(root))
    except ConfigError:
        if name == EMBEDDED_MODEL or Path(name).is_dir() or "/" in name.strip("/"):
            return name
        raise
    if not folder.export.is_dir():
        remedy = f"make one with lightning-hub export {folder.id}"
        raise ConfigError("the run has no export yet", where=str(folder.path), remedy=remedy)
    if folder.id != name:
        print(f"note: {name} is the run {folder.id}", file=sys.stderr)
    return str(folder.export)
