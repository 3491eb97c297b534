"""What a resumed run is compared with: facts of the run that wrote the checkpoint, by the names of a recipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_hub.checkpoints.checkpoint_io import read_state
from lightning_hub.config.resolved import ResolvedConfig
from lightning_hub.errors import ConfigError

Facts = dict[str, str]


def check_resume(before: Facts, now: Facts, must_match: Facts, *, allowed: bool, speak: bool) -> None:
    """Name everything that has changed since a checkpoint, and refuse what would change the steps.

    A checkpoint of an earlier version can lack a binding fact: then the run resumes, with a note.

    Args:
        before: Facts of the run that wrote the checkpoint.
        now: Facts of this one.
        must_match: Those of them that decide the order and content of the steps.
        allowed: Whether these may change, because somebody said so.
        speak: Whether this process says the others (rank 0).

    Raises:
        ConfigError: A binding fact has changed.
    """
    changed = {name: (before[name], now[name]) for name in before if name in now and before[name] != now[name]}
    refused = {} if allowed else {name: change for name, change in changed.items() if name in must_match}
    if refused:
        raise ConfigError(
            f"changed since the checkpoint: {'; '.join(_said(name, change) for name, change in refused.items())}",
            where="--resume",
            remedy="go on with the same data and batch settings, start a new run, or pass --allow-changed-data",
        )
    if not speak:
        return
    for name, change in changed.items():
        print(f"note: {_said(name, change)} since the checkpoint", file=sys.stderr)
    if unknown := [_HASHES.get(name, name) for name in must_match if name not in before]:
        note = f"note: {', '.join(unknown)} could not be compared: an earlier version wrote the checkpoint"
        print(note, file=sys.stderr)


_HASHES = {"samples": "the training samples", "tokenizer": "the tokenizer"}
"""Facts that are hashes of things, and the things in words."""


def _said(name: str, change: tuple[str, str]) -> str:
    subject = f"the hash of {_HASHES[name]}" if name in _HASHES else name
    return f"{subject} was {change[0]} and is {change[1]}"


KEYS = (
    "seed_everything",
    "trainer.precision",
    "trainer.gradient_clip_val",
    "trainer.gradient_clip_algorithm",
    "model.class_path",
)
"""What shapes a training beside the method's own options."""


def recipe_fingerprint(config: ResolvedConfig) -> dict[str, str]:
    """Return the method's options and what else of a recipe shapes the numbers, by their keys."""
    tree, facts = config.tree(), {}
    for key in KEYS:
        value: Any = tree
        for word in key.split("."):
            value = (value or {}).get(word)
        facts[key] = str(value)
    return facts | {f"model.init_args.{name}": str(value) for name, value in config.model.init_args.items()}


def check_limits(checkpoint: Path, max_epochs: int | None) -> None:
    """Refuse a limit that lies before the epoch in which a checkpoint was made.

    Args:
        checkpoint: What the run goes on from.
        max_epochs: Of the trainer.

    Raises:
        ConfigError: It does.
    """
    progress = read_state(checkpoint).get("loops", {}).get("fit_loop", {}).get("epoch_progress", {})
    done = progress.get("current", {}).get("processed", 0)
    if max_epochs not in (None, -1) and done > int(str(max_epochs)):
        remedy = f"give at least {done}, or go on from an older checkpoint with --resume PATH"
        message = f"{max_epochs} lies before the checkpoint, which has finished {done} epochs"
        raise ConfigError(message, where="trainer.max_epochs", remedy=remedy)


def check_fixed_options(checkpoint: Path, facts: dict[str, str], names: Iterable[str]) -> None:
    """Refuse options of the method that say what the tensors of a checkpoint are, if they are not those it was made by.

    Some would not fit; others would, and mean another model.

    Args:
        checkpoint: What the run goes on from.
        facts: Of this run.
        names: Of these options.

    Raises:
        ConfigError: One has changed.
    """
    before = read_state(checkpoint).get("facts", {})
    if before.get("model.class_path") != facts["model.class_path"]:
        return  # another method's options
    for key in (f"model.init_args.{name}" for name in names):
        if key in before and before[key] != facts.get(key):
            raise ConfigError(
                f"it was {before[key]} when the checkpoint was made and is {facts.get(key)}, and what has been trained "
                "hangs on it",
                where=key,
                remedy="leave it as it was, or start a new run",
            )
