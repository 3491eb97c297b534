"""Compares a resumed run with the run that wrote its checkpoint: options, data and limits."""

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
    """Print everything that has changed since a checkpoint, and reject changes of the order or content of steps.

    A checkpoint of an earlier version can lack a fact of ``must_match``: then the run resumes, with a note.

    Args:
        before: Facts of the run that wrote the checkpoint.
        now: Facts of this run.
        must_match: Those facts on which the order and content of the steps depend.
        allowed: Whether these may change (``--allow-changed-data``).
        speak: Whether this process prints notes (rank 0).

    Raises:
        ConfigError: A fact of ``must_match`` has changed.
    """
    changed = {name: (before[name], now[name]) for name in before if name in now and before[name] != now[name]}
    refused = {} if allowed else {name: change for name, change in changed.items() if name in must_match}
    if refused:
        raise ConfigError(
            f"changed since the checkpoint: {'; '.join(_describe(name, change) for name, change in refused.items())}",
            where="--resume",
            remedy="resume with the same data and batch settings, start a new run, or pass --allow-changed-data",
        )
    if not speak:
        return
    for name, change in changed.items():
        print(f"note: {_describe(name, change)} since the checkpoint", file=sys.stderr)
    if unknown := [_HASHES.get(name, name) for name in must_match if name not in before]:
        note = f"note: {', '.join(unknown)} could not be compared: an earlier version wrote the checkpoint"
        print(note, file=sys.stderr)


_HASHES = {"samples": "the training samples", "tokenizer": "the tokenizer"}
"""Facts that are hashes, and what they are hashes of."""


def _describe(name: str, change: tuple[str, str]) -> str:
    subject = f"the hash of {_HASHES[name]}" if name in _HASHES else name
    return f"{subject} was {change[0]} and is {change[1]}"


KEYS = (
    "seed_everything",
    "trainer.precision",
    "trainer.gradient_clip_val",
    "trainer.gradient_clip_algorithm",
    "model.class_path",
)
"""Keys of options that change the numbers of a training, beside the options of the method."""


def recipe_fingerprint(config: ResolvedConfig) -> dict[str, str]:
    """Return the options of the method, and the others that change the numbers of a training, by their keys."""
    tree, facts = config.tree(), {}
    for key in KEYS:
        value: Any = tree
        for word in key.split("."):
            value = (value or {}).get(word)
        facts[key] = str(value)
    return facts | {f"model.init_args.{name}": str(value) for name, value in config.model.init_args.items()}


def check_limits(checkpoint: Path, max_epochs: int | None) -> None:
    """Reject a limit of epochs that is below the finished epochs of a checkpoint.

    Args:
        checkpoint: The checkpoint to resume from.
        max_epochs: The option of the trainer.

    Raises:
        ConfigError: The limit is too low.
    """
    progress = read_state(checkpoint).get("loops", {}).get("fit_loop", {}).get("epoch_progress", {})
    done = progress.get("current", {}).get("processed", 0)
    if max_epochs not in (None, -1) and done > int(str(max_epochs)):
        remedy = f"set at least {done}, or resume from an older checkpoint with --resume PATH"
        message = f"{max_epochs} is before the checkpoint, which has finished {done} epochs"
        raise ConfigError(message, where="trainer.max_epochs", remedy=remedy)


def check_fixed_options(checkpoint: Path, facts: dict[str, str], names: Iterable[str]) -> None:
    """Reject changed options on which the tensors of a checkpoint depend.

    Some tensors would not fit the model; others would fit, but give another model.

    Args:
        checkpoint: The checkpoint to resume from.
        facts: The facts of this run.
        names: The names of these options.

    Raises:
        ConfigError: An option has changed.
    """
    before = read_state(checkpoint).get("facts", {})
    if before.get("model.class_path") != facts["model.class_path"]:
        return  # another method's options
    for key in (f"model.init_args.{name}" for name in names):
        if key in before and before[key] != facts.get(key):
            raise ConfigError(
                f"it was {before[key]} when the checkpoint was made and is {facts.get(key)}; the trained tensors "
                "depend on this option",
                where=key,
                remedy=f"set it to {before[key]}, or start a new run",
            )
