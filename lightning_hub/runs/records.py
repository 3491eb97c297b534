"""The small JSON files of a run as typed records; unknown keys are ignored, missing keys have defaults."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Literal, Self

from lightning_hub.runs.files import Json

SCHEMA = 1
"""The version of the run folder that this package writes; it increases when the meaning of a file changes."""

State = Literal["queued", "starting", "running", "stopping", "finished", "failed", "stopped", "preempted"]
Phase = Literal["init", "train", "eval", "save", "exit"]

ENDED: frozenset[str] = frozenset({"finished", "failed", "stopped", "preempted"})
"""States of a run whose processes have all ended."""


@cache
def _hints(cls: type) -> dict[str, object]:
    return typing.get_type_hints(cls)


def _fits(value: object, hint: object) -> bool:
    """Return whether a value of a file has the declared type (an integer is a float too)."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, member) for member in hint.__args__)
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(hint, type) and isinstance(value, hint)


class Record:
    """Base of the records. Reading accepts files of a newer or faulty writer; writing is exact."""

    @classmethod
    def from_json(cls, data: Mapping[str, Json] | None) -> Self:
        """Read a record; a key that is absent or of another type keeps its default."""
        given = data or {}
        known = {}
        hints = _hints(cls)  # type: ignore[arg-type]  # a class is hashable
        for item in fields(cls):  # type: ignore[arg-type]  # every subclass is a dataclass
            key = item.metadata.get("key", item.name)
            if key in given and _fits(given[key], hints[item.name]):
                known[item.name] = given[key]
        return cls(**known)

    def to_json(self) -> dict[str, Json]:
        """Return the record in the form of its file."""
        return {
            item.metadata.get("key", item.name): getattr(self, item.name)
            for item in fields(self)  # type: ignore[arg-type]  # every subclass is a dataclass
        }


@dataclass(frozen=True)
class RunInfo(Record):
    """``run.json``: the description of a run, written once."""

    schema: int = SCHEMA
    id: str = ""
    name: str = ""
    method: str = ""
    model: str = ""
    created: str = ""
    nnodes: int = 1
    nproc_per_node: int = 1
    launcher: str = ""
    package_version: str = ""
    git: dict[str, Json] | None = None
    config_sha256: str = ""
    preset: str | None = None


@dataclass(frozen=True)
class Status(Record):
    """``status.json``: the state of a run, written by its supervisor or by rank 0.

    ``max_steps`` is null while it is unknown; ``warning`` says what could not be written.
    """

    state: State = "queued"
    reason: str | None = None
    step: int = 0
    max_steps: int | None = None
    exit_code: int | None = None
    error: str | None = None
    warning: str | None = None
    attempt: int = 0
    time: str = ""


@dataclass(frozen=True)
class Heartbeat(Record):
    """``heartbeat.json`` of a rank, at most 512 bytes."""

    seq: int = 0
    time: str = ""
    mono: float = 0.0
    step: int = 0
    epoch: int = 0
    phase: Phase = "init"
    doing: str = ""
    doing_since: float = 0.0
    loss: float | str | None = None
    pid: int = 0
    pid_start: float = 0.0
    boot_id: str = ""


@dataclass(frozen=True)
class Lease(Record):
    """``lease.json`` of a node: it says that its supervisor is alive.

    ``children`` holds ``rank``, ``pid``, ``pid_start`` and ``exit_code`` (null while it runs) of each process.
    """

    seq: int = 0
    time: str = ""
    mono: float = 0.0
    attempt: int = 0
    host: str = ""
    pid: int = 0
    pid_start: float = 0.0
    boot_id: str = ""
    children: list[dict[str, Json]] = field(default_factory=list)


@dataclass(frozen=True)
class Attempt(Record):
    """``attempt.json``: the reason of an attempt and its first step."""

    attempt: int = 1
    reason: str = ""
    created: str = ""
    world_size: int = 1
    step: int = 0
    checkpoint: str | None = None
    master_port: int | None = None


@dataclass(frozen=True)
class ErrorRecord(Record):
    """``error.json`` of a rank: the error that ended it."""

    time: str = ""
    type: str = ""
    message: str = ""
    traceback: str = ""
    rank: int = 0
    node: int = 0
    step: int = 0
    kind: str = field(default="internal", metadata={"key": "class"})
    where: str | None = None
    remedy: str | None = None


def newer_schema(info: RunInfo) -> str | None:
    """Return a sentence when a run was written by a newer package, else None."""
    if info.schema <= SCHEMA:
        return None
    return (
        f"written by a newer version (schema {info.schema}, this version reads {SCHEMA}): unknown parts are not shown"
    )
