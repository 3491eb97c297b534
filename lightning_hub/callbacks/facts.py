"""What a resumed run is compared with: facts of the run that wrote the checkpoint, by the names of a recipe."""

from __future__ import annotations

import sys

from lightning_hub.errors import ConfigError

Facts = dict[str, str]


def compare(before: Facts, now: Facts, binding: Facts, *, allowed: bool, speak: bool) -> None:
    """Name everything that has changed since a checkpoint, and refuse what would change the steps.

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
    for name, change in changed.items():
        if speak:
            print(f"note: {_said(name, change)} since the checkpoint", file=sys.stderr)


def _said(name: str, change: tuple[str, str]) -> str:
    return f"{name} was {change[0]} and is {change[1]}"
