"""Finds runs without a finished step. A refused command leaves such a run; the next command can use its folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.manifest import list_checkpoints
from lightning_hub.runs.reader import RunView, read_run

_BEFORE_RUN_JSON = {"lock", "control", "checkpoints", "nodes"}
"""Files and folders of a run folder before it has a `run.json`."""


def is_unused(view: RunView) -> bool:
    """Return whether a run has ended without a finished step."""
    return view.step == 0 and not view.is_live and view.verdict.state != "finished"


def holds_unused_run(folder: RunFolder) -> bool:
    """Return whether a folder has such a run and no checkpoint."""
    try:
        names = {path.name for path in folder.path.iterdir()}
    except OSError:
        return False
    if not names or any(list_checkpoints(folder.checkpoints)):
        return False
    if not folder.run_json.is_file():
        return names <= _BEFORE_RUN_JSON and "lock" in names
    return is_unused(read_run(folder))


def clear_run(folder: RunFolder) -> None:
    """Remove the files of a run except its lock, which the caller has; files that are not of a run stay."""
    files = ("run_json", "config", "config_input", "plan", "status", "metrics", "samples", "data_report", "events")
    folders = (folder.checkpoints, folder.control, folder.path / "attempts", folder.path / "nodes")
    for path in (*(getattr(folder, name) for name in files), *folders, folder.path / "loggers"):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
