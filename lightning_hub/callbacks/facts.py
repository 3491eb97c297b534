"""What a resumed run is compared with: facts of the run that wrote the checkpoint, by the names of a recipe."""

from __future__ import annotations

import sys

from lightning_hub.errors import ConfigError

Facts = dict[str, str]


def compare(before: Facts, now: Facts, binding: Facts, *, allowed: bool, speak: bool) -> None:
    """Name everything that has changed since a checkpoint, and refuse what would change the steps.

    A checkpoint of an earlier version can lack a binding fact: then the run resumes, with a note.

    Args:
        before: Facts of the run that wrote the checkpoint.
        now: Facts of this one.
        binding: Those of them that decide the order and content of the steps.
        allowed: Whether these may change, because somebody said so.
        speak: Whether this process says the others (rank 0).

    Raises:
        ConfigError: A binding fact has changed.
    """
    changed = {name: (before[name], now[name]) for name in before if name in now and before[name] != now[name]}
    refused = {} if allowed else {name: change for name, change in changed.items() if name in binding}
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
    if unknown := [_HASHES.get(name, name) for name in binding if name not in before]:
        note = f"note: {', '.join(unknown)} could not be compared: an earlier version wrote the checkpoint"
        print(note, file=sys.stderr)


_HASHES = {"samples": "the training samples", "tokenizer": "the tokenizer"}
"""Facts that are hashes of things, and the things in words."""


def _said(name: str, change: tuple[str, str]) -> str:
    subject = f"the hash of {_HASHES[name]}" if name in _HASHES else name
    return f"{subject} was {change[0]} and is {change[1]}"
