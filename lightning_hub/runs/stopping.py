"""``lightning-hub runs stop``: requests a stop after the current step, or ends the run at once."""

from __future__ import annotations

import time
from collections.abc import Iterator

from lightning_hub.errors import ConfigError, ExitCode
from lightning_hub.runs.files import make_private_folder, read_json, touch
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.process_identity import ProcessIdentity, boot_id
from lightning_hub.runs.processes import end_process
from lightning_hub.runs.reader import RunView, read_run
from lightning_hub.runs.records import ENDED, Lease, Status
from lightning_hub.runs.show import age
from lightning_hub.runs.writer import StatusWriter

AT_ONCE = "stopped at once; the newest checkpoint is untouched"
"""The reason in the status of a run that was ended by ``--now``."""

_SUPERVISOR_SECONDS = 10.0
"""How long a supervisor has to end its run after the request."""
_PERIOD = 0.05


def request_stop(folder: RunFolder, view: RunView) -> str:
    """Write the request to save and stop, and return the text to print."""
    make_private_folder(folder.control)
    touch(folder.control_stop)
    lines = [f"{folder.id} will save a checkpoint and stop after its current step"]
    for rank in view.ranks:
        if rank.state in ("silent", "stalled"):
            since = f" for {age(rank.age)}" if rank.state == "silent" else ""
            doing = f", in {rank.doing}" if rank.doing else ""
            lines.append(f"rank {rank.rank} is {rank.state}{since} at step {rank.step}{doing}: it may not stop")
    if len(lines) > 1:
        lines.append(f"lightning-hub runs stop {folder.id} --now ends the run at once, without a new checkpoint")
    return "\n".join(lines)


def stop_now(folder: RunFolder) -> str:
    """End the processes of a run on this machine at once, and return the text to print.

    The supervisor gets a request first, so that it can write how the run ended. If it does not end, it is killed too.

    Raises:
        ConfigError: A process cannot be ended from here.
    """
    data = read_json(folder.node(0).lease) or {}
    lease, supervisor = Lease.from_json(data), ProcessIdentity.from_json(data)
    make_private_folder(folder.control)
    touch(folder.control_stop_now)
    if supervisor is not None and any(child.get("pid") != lease.pid for child in lease.children):
        end = time.monotonic() + _SUPERVISOR_SECONDS
        while supervisor.is_alive() and time.monotonic() < end:
            time.sleep(_PERIOD)
    for what, identity in _processes(folder):
        end_process(identity, what, folder)
    folder.control_stop_now.unlink(missing_ok=True)
    if _state(folder) not in ENDED:
        writer = StatusWriter(folder)
        step = read_run(folder).step
        writer.set_status("failed", reason=AT_ONCE, step=step, exit_code=int(ExitCode.HARD_STOP))
        writer.close_events()
    return f"{folder.id} is {AT_ONCE}"


def _state(folder: RunFolder) -> str:
    return Status.from_json(read_json(folder.status)).state


def _processes(folder: RunFolder) -> Iterator[tuple[str, ProcessIdentity]]:
    """Yield the running processes of the newest attempt, the supervisor first.

    Raises:
        ConfigError: One of them is on another machine.
    """
    data = read_json(folder.node(0).lease) or {}
    candidates = [("its supervisor", data)]
    for child in Lease.from_json(data).children:
        machine = {"boot_id": data.get("boot_id"), "host": data.get("host")}
        candidates.append((f"rank {child.get('rank')}", {**child, **machine}))
    for attempt in folder.attempts()[-1:]:
        for rank in folder.ranks(attempt):
            candidates.append((f"rank {rank}", read_json(folder.rank(attempt, rank).heartbeat) or {}))
    known: set[int] = set()
    for what, values in candidates:
        identity = ProcessIdentity.from_json(values)
        if identity is None or values.get("exit_code") is not None or values.get("phase") == "exit":
            continue
        if identity.boot != boot_id():
            remedy = "run the command on that machine"
            raise ConfigError(f"{what} runs on another machine ({identity.host})", where="--now", remedy=remedy)
        if identity.pid not in known and identity.is_alive():
            known.add(identity.pid)
            yield what, identity
