"""Writes the files of a run, for the supervisor or, in a single-process ``fit``, for rank 0."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Self

from lightning_hub import __version__
from lightning_hub.runs.environment import describe_environment, git_state
from lightning_hub.runs.files import Json, LineFile, make_private_folder, read_json, write_atomic, write_json
from lightning_hub.runs.folder import RunFolder, lock_run, now, unlock_run
from lightning_hub.runs.hardware_metrics import HardwareMetrics
from lightning_hub.runs.heartbeat import PeriodicThread
from lightning_hub.runs.process_identity import ProcessIdentity
from lightning_hub.runs.records import Attempt, Lease, RunInfo, State, Status
from lightning_hub.runs.terminal import print_to_terminal

LEASE_PERIOD = 5.0


class WriteErrors:
    """Keeps the first error of writing and prints it once, because a full disk must not stop the training."""

    def __init__(self) -> None:
        self.message: str | None = None

    def __call__(self, error: OSError) -> None:
        """Report an error; only the first one is printed."""
        if self.message is None:
            self.message = f"the run folder cannot be written: {error.strerror} ({error.filename or 'open file'})"
            print_to_terminal(f"warning: {self.message}; the training continues without these files\n")


@dataclass(frozen=True)
class NewRun:
    """The description of a run before it starts.

    Attributes:
        name: Beginning of its id.
        method: The short name of the model's class, in small letters: ``sft``.
        model: The model to train: a folder or a hub id.
        config: Text of ``config.yaml``.
        inputs: The unchanged inputs of the user: (file or flag, text) in order.
        plan: Content of ``plan.json``.
        launcher: The launcher; ``fit`` if ``fit`` starts the ranks itself.
        nnodes: Number of nodes.
        nproc_per_node: Processes on each node.
        preset: The shipped recipe of the run, if it uses one.
        trust_remote_code: Whether the user allowed the model's own code to run.
    """

    name: str
    method: str
    model: str
    config: str
    inputs: Sequence[tuple[str, str]] = ()
    plan: Mapping[str, Json] | None = None
    launcher: str = "fit"
    nnodes: int = 1
    nproc_per_node: int = 1
    preset: str | None = None
    trust_remote_code: bool = False


class StatusWriter:
    """Writes the state of a run to ``status.json`` and ``events.jsonl``.

    Only one process writes at a time: the supervisor before the ranks start and after they have ended, rank 0 in
    between.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.trouble = WriteErrors()
        self.status = Status.from_json(read_json(folder.status))
        self.attempt = folder.attempts()[-1] if folder.attempts() else 0
        self._events = LineFile(folder.events)

    def set_status(
        self,
        state: State,
        *,
        reason: str | None = None,
        step: int | None = None,
        max_steps: int | None = None,
        exit_code: int | None = None,
        error: Path | None = None,
    ) -> None:
        """Change the state; ``step`` and ``max_steps`` stay the same if they are not given."""
        changed = replace(
            self.status,
            state=state,
            reason=reason,
            step=self.status.step if step is None else step,
            max_steps=self.status.max_steps if max_steps is None else max_steps,
            exit_code=exit_code,
            error=str(error.relative_to(self.folder.path)) if error else None,
            warning=self.trouble.message,
            attempt=self.attempt,
            time=now(),
        )
        if changed.state != self.status.state:
            self.event("state", state=state, reason=reason)
        self.status = changed
        self._guarded(lambda: write_json(self.folder.status, changed.to_json(), fsync=True))

    def refresh(self) -> None:
        """Read the status again, after another process has written it."""
        self.status = Status.from_json(read_json(self.folder.status))

    def event(self, kind: str, **details: Json) -> None:
        """Append a line to ``events.jsonl``."""
        line = json.dumps({"time": now(), "event": kind, **details}, ensure_ascii=False)
        self._guarded(lambda: self._events.append(line))

    def _guarded(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self.trouble(error)

    def close_events(self) -> None:
        """Close ``events.jsonl``."""
        self._events.close()


class RunWriter(StatusWriter):
    """Writes the files of a run that exist once for all ranks: by the supervisor, or by rank 0 in a single process.

    ``create`` starts a new run; the constructor opens an existing run for another attempt. Call ``close`` at the end:
    it ends the lease and unlocks the run.

    Raises:
        ConfigError: Another process writes this run.
    """

    def __init__(self, folder: RunFolder) -> None:
        lock_run(folder)
        super().__init__(folder)
        self._lease_seq = 0
        self.children: list[dict[str, Json]] = []
        """``rank``, ``pid``, ``pid_start`` and ``exit_code`` of each process of this node."""
        self._lease = PeriodicThread("lease", LEASE_PERIOD, self._beat, self.trouble)
        self._gauges: HardwareMetrics | None = None

    @classmethod
    def create(cls, folder: RunFolder, run: NewRun) -> Self:
        """Lock a new run and write the files that describe it.

        Raises:
            ConfigError: Another process writes this run.
            OSError: The folder cannot be written; nothing was started.
        """
        writer = cls(folder)
        info = RunInfo(
            id=folder.id,
            name=run.name,
            method=run.method,
            model=run.model,
            created=now(),
            nnodes=run.nnodes,
            nproc_per_node=run.nproc_per_node,
            launcher=run.launcher,
            package_version=__version__,
            git=git_state(),
            config_sha256=sha256(run.config.encode()).hexdigest(),
            preset=run.preset,
        )
        for name in (folder.control, folder.checkpoints, folder.node(0).path):
            make_private_folder(name)
        write_json(folder.run_json, info.to_json() | {"trust_remote_code": run.trust_remote_code}, fsync=True, indent=1)
        write_atomic(folder.config, run.config.encode(), fsync=True)
        write_atomic(folder.config_input, input_text(run.inputs).encode(), fsync=True)
        write_json(folder.plan, run.plan or {}, fsync=True, indent=1)
        writer.event("created", launcher=run.launcher)
        writer.set_status("queued")
        return writer

    def start_attempt(
        self,
        reason: str,
        *,
        step: int = 0,
        checkpoint: Path | None = None,
        world_size: int = 1,
        master_port: int | None = None,
        devices: Sequence[str] = (),
    ) -> int:
        """Begin the next attempt and return its number, counted from 1.

        Args:
            reason: The reason of the attempt: ``first start``, ``resumed by hand`` ...
            step: The step from which it continues.
            checkpoint: The checkpoint from which it resumes.
            world_size: Number of ranks.
            master_port: The port of rank 0, if there are several ranks.
            devices: Names of the devices of this node, from a caller that has imported torch.
        """
        self.attempt += 1
        name = checkpoint.name if checkpoint else None
        record = Attempt(self.attempt, reason, now(), world_size, step, name, master_port)
        make_private_folder(self.folder.attempt(self.attempt))
        write_json(self.folder.attempt_json(self.attempt), record.to_json(), fsync=True, indent=1)
        make_private_folder(self.folder.node(0).path)
        write_json(self.folder.node(0).env, describe_environment(devices), fsync=True, indent=1)
        for request in (self.folder.control_stop, self.folder.control_stop_now, self.folder.control_checkpoint):
            request.unlink(missing_ok=True)  # a request to an earlier attempt is not for this one
        own = ProcessIdentity.own()
        self.children = [{"rank": 0, "pid": own.pid, "pid_start": own.start, "exit_code": None}]
        self.event("attempt", attempt=self.attempt, reason=reason, checkpoint=name)
        self.set_status("starting", reason=reason, step=step)
        self._lease.start()
        return self.attempt

    def tell_children(self, children: list[dict[str, Json]]) -> None:
        """Write the processes of this node to the lease now, so that they can be found if this process is killed."""
        self.children = children
        self._guarded(self._write_lease)

    def _beat(self) -> None:
        self._write_lease()
        if self._gauges is None:
            self._gauges = HardwareMetrics(self.folder.node(0).gauges, self.folder.path)
        self._gauges.write()

    def _write_lease(self) -> None:
        self._lease_seq += 1
        own = ProcessIdentity.own()
        lease = Lease(
            seq=self._lease_seq,
            time=now(),
            mono=round(time.monotonic(), 3),
            attempt=self.attempt,
            host=own.host,
            pid=own.pid,
            pid_start=own.start,
            boot_id=own.boot,
            children=self.children,
        )
        write_json(self.folder.node(0).lease, lease.to_json())

    def close(self, exit_code: int = 0) -> None:
        """Write the exit code to the lease, end it, and unlock the run."""
        self.children = [
            child if child["exit_code"] is not None else child | {"exit_code": exit_code} for child in self.children
        ]
        if self.attempt and self._lease.ident is not None:
            self._lease.stop()
        self.close_events()
        self._guarded(lambda: unlock_run(self.folder))


def input_text(inputs: Sequence[tuple[str, str]]) -> str:
    """Return the inputs of the user as one text: a single file unchanged, else each input with its name above it."""
    if len(inputs) == 1 and not inputs[0][0].startswith("--"):
        return inputs[0][1]
    files = [f"# {name}\n{text}" for name, text in inputs if not name.startswith("--")]
    flags = [f"# {name} {json.dumps(text, ensure_ascii=False)}\n" for name, text in inputs if name.startswith("--")]
    return "---\n".join(text if text.endswith("\n") else f"{text}\n" for text in files) + "".join(flags)
