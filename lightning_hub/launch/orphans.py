"""Finds and ends ranks of earlier attempts that still run although their supervisor has ended."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from lightning_hub.launch.environment import ATTEMPT_VARIABLE, RUN_VARIABLE
from lightning_hub.runs.files import Json, read_json
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.process_identity import ProcessIdentity, boot_id
from lightning_hub.runs.processes import end_process


@dataclass(frozen=True)
class Orphan:
    """A running rank of an earlier attempt."""

    rank: int
    attempt: int
    identity: ProcessIdentity


def find_orphans(folder: RunFolder) -> list[Orphan]:
    """Return the ranks of earlier attempts that run on this machine.

    Leases and heartbeats name them by pid, start time and boot id, so another process that has the same pid now is not
    taken for one. Ranks whose supervisor was killed before they wrote a file are found by their environment.
    """
    found: dict[int, Orphan] = {}
    if not folder.attempts():
        return []
    for orphan in (*_from_leases(folder), *_from_heartbeats(folder), *_from_environments(folder)):
        if orphan.identity.pid != os.getpid() and orphan.identity.is_alive():
            found.setdefault(orphan.identity.pid, orphan)
    return list(found.values())


def end_orphans(folder: RunFolder) -> None:
    """End the ranks of earlier attempts: only this process may write to the run now.

    Call it with the run locked: then their supervisor has ended.

    Raises:
        ConfigError: One cannot be ended; it is named.
    """
    orphans = find_orphans(folder)
    for orphan in orphans:
        end_process(orphan.identity, f"rank {orphan.rank} of attempt {orphan.attempt}", folder)
    for orphan in orphans:
        what = f"rank {orphan.rank} of attempt {orphan.attempt} (process {orphan.identity.pid})"
        print(f"note: {what} still ran without its supervisor and was ended", file=sys.stderr)


def _from_leases(folder: RunFolder) -> Iterator[Orphan]:
    for node in folder.nodes():
        lease = read_json(folder.node(node).lease) or {}
        children = lease.get("children")
        for child in children if isinstance(children, list) else []:
            if isinstance(child, dict) and child.get("exit_code") is None:
                machine: dict[str, Json] = {"boot_id": lease.get("boot_id"), "host": lease.get("host")}
                yield from _orphan(child.get("rank"), lease.get("attempt"), {**child, **machine})


def _from_heartbeats(folder: RunFolder) -> Iterator[Orphan]:
    for attempt in folder.attempts():
        for rank in folder.ranks(attempt):
            beat = read_json(folder.rank(attempt, rank).heartbeat) or {}
            if beat.get("phase") != "exit":  # else its process may run on, and train something else
                yield from _orphan(rank, attempt, beat)


def _from_environments(folder: RunFolder) -> Iterator[Orphan]:
    told = {RUN_VARIABLE: str(folder.path.resolve()), "TORCHELASTIC_RUN_ID": folder.id}
    above = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    for process in psutil.process_iter():
        try:
            environ = process.environ()
        except psutil.Error:
            continue
        if process.pid in above or any(environ.get(name) != value for name, value in told.items()):
            continue
        rank, attempt = environ.get("RANK", ""), environ.get(ATTEMPT_VARIABLE, "")
        identity = ProcessIdentity.of(process.pid)
        if identity is not None and rank.isdecimal() and attempt.isdecimal():
            yield Orphan(int(rank), int(attempt), identity)


def _orphan(rank: Json, attempt: Json, data: dict[str, Json]) -> Iterator[Orphan]:
    identity = ProcessIdentity.from_json(data)
    if identity is not None and identity.boot == boot_id() and isinstance(rank, int) and isinstance(attempt, int):
        yield Orphan(rank, attempt, identity)
