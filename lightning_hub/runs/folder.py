"""The run folder: defines every path of a run, creates runs and finds them."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from lightning_hub.errors import ConfigError
from lightning_hub.runs.files import FOLDER_MODE, make_private_folder, open_append, read_json, write_atomic
from lightning_hub.runs.process_identity import ProcessIdentity
from lightning_hub.runs.records import RunInfo

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
ROOT_VARIABLE = "LIGHTNING_HUB_RUNS"
DEFAULT_ROOT = "runs"

_RESUME = "give --resume auto to continue this run, or give another folder"


def now() -> str:
    """Return the current time as it is written to files: UTC, with its zone."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


CHECKPOINT_PREFIX = "step-"


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint folder after ``step`` finished steps."""
    return f"{CHECKPOINT_PREFIX}{step}"


@dataclass(frozen=True)
class RankFolder:
    """The files of one rank in one attempt."""

    path: Path

    @property
    def stdout(self) -> Path:
        """First part of the log of standard output."""
        return self.path / "stdout.log"

    @property
    def stderr(self) -> Path:
        """First part of the log of standard error."""
        return self.path / "stderr.log"

    @property
    def heartbeat(self) -> Path:
        """The heartbeat, written every 2 s."""
        return self.path / "heartbeat.json"

    @property
    def error(self) -> Path:
        """The error that ended the rank."""
        return self.path / "error.json"

    @property
    def stacks(self) -> Path:
        """Python stacks of a stalled rank."""
        return self.path / "stacks.txt"


@dataclass(frozen=True)
class NodeFolder:
    """The files of one node."""

    path: Path

    @property
    def env(self) -> Path:
        """Allow-listed environment, versions and hardware."""
        return self.path / "env.json"

    @property
    def gauges(self) -> Path:
        """Load, memory and temperatures."""
        return self.path / "gauges.json"

    @property
    def lease(self) -> Path:
        """The lease of the supervisor of this node."""
        return self.path / "lease.json"


@dataclass(frozen=True)
class RunFolder:
    """A run, as a folder."""

    path: Path

    @property
    def id(self) -> str:
        """The name of the folder."""
        return self.path.name

    @property
    def run_json(self) -> Path:
        """Name, method, model and launcher of the run."""
        return self.path / "run.json"

    @property
    def config(self) -> Path:
        """The complete recipe; with it the run can be repeated."""
        return self.path / "config.yaml"

    @property
    def config_input(self) -> Path:
        """The recipe files and flags that the user gave."""
        return self.path / "config.input.yaml"

    @property
    def plan(self) -> Path:
        """The exact argv and environment of every node."""
        return self.path / "plan.json"

    @property
    def status(self) -> Path:
        """The current state of the run."""
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        """One line per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Generations made during the run."""
        return self.path / "samples.jsonl"

    @property
    def data_report(self) -> Path:
        """How many examples of the input were used, and why others were not."""
        return self.path / "data_report.json"

    @property
    def events(self) -> Path:
        """Launches, stops, restarts and changes of state."""
        return self.path / "events.jsonl"

    @property
    def lock(self) -> Path:
        """The process that may write this run."""
        return self.path / "lock"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def latest(self) -> Path:
        """Link to the newest committed checkpoint."""
        return self.checkpoints / "latest"

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after a step."""
        return self.checkpoints / checkpoint_name(step)

    @property
    def export(self) -> Path:
        """The result as a plain model folder, or as an adapter."""
        return self.path / "export"

    @property
    def export_merged(self) -> Path:
        """An adapter merged into its base model, as a plain model folder."""
        return self.path / "export-merged"

    @property
    def control(self) -> Path:
        """Folder of the request files."""
        return self.path / "control"

    @property
    def control_stop(self) -> Path:
        """The request to save a checkpoint and stop."""
        return self.control / "stop"

    @property
    def control_stop_now(self) -> Path:
        """The request to end all ranks at once; the supervisor reads it."""
        return self.control / "stop-now"

    @property
    def control_checkpoint(self) -> Path:
        """The request to save a checkpoint and continue."""
        return self.control / "checkpoint"

    def node(self, number: int) -> NodeFolder:
        """Files of a node."""
        return NodeFolder(self.path / "nodes" / str(number))

    def attempt(self, number: int) -> Path:
        """Folder of an attempt; the first is 1."""
        return self.path / "attempts" / str(number)

    def attempt_json(self, number: int) -> Path:
        """Reason and first step of an attempt."""
        return self.attempt(number) / "attempt.json"

    def attempt_config(self, number: int) -> Path:
        """The recipe of an attempt after the first."""
        return self.attempt(number) / "config.yaml"

    def rank(self, attempt: int, rank: int) -> RankFolder:
        """Files of a rank in an attempt."""
        return RankFolder(self.attempt(attempt) / f"rank{rank}")

    def attempts(self) -> list[int]:
        """Return the numbers of the attempts made so far, in order."""
        return _numbers(self.path / "attempts", "")

    def ranks(self, attempt: int) -> list[int]:
        """Return the ranks that have files in an attempt, in order."""
        return _numbers(self.attempt(attempt), "rank")

    def nodes(self) -> list[int]:
        """Return the nodes that have files, in order."""
        return _numbers(self.path / "nodes", "")

    def info(self) -> RunInfo:
        """Read ``run.json``."""
        return RunInfo.from_json(read_json(self.run_json))


def _numbers(folder: Path, prefix: str) -> list[int]:
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.name.startswith(prefix)]
    except OSError:
        return []
    return sorted(int(name[len(prefix) :]) for name in names if name[len(prefix) :].isdigit())


EMBEDDED_MODEL = "demo"
"""The name of the model that is part of the package."""


def runs_root(given: str | Path | None = None) -> Path:
    """Return the folder of the runs: ``--runs-root``, else LIGHTNING_HUB_RUNS, else ``runs`` in the working folder."""
    return Path(given or os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT)


def default_cache_dir() -> Path:
    """Return the folder of the cache: ``LIGHTNING_HUB_CACHE``, else ``~/.cache/lightning-hub``."""
    return Path(os.environ.get("LIGHTNING_HUB_CACHE") or Path.home() / ".cache" / "lightning-hub")


def create_run(name: str, root: Path) -> RunFolder:
    """Make a new run folder ``<name>-<UTC time>[-k]``.

    Raises:
        ConfigError: The name is not allowed, or the folder cannot be made.
    """
    if not NAME.fullmatch(name):
        remedy = "use at most 64 of a-z, 0-9, '.', '_' and '-', starting with a letter or digit"
        raise ConfigError(f"{name!r:.80} cannot be the name of a run", where="--run-name", remedy=remedy)
    stamp = f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    try:
        make_private_folder(root)
        return RunFolder(_make_first_free(root, stamp))
    except OSError as error:
        raise _cannot_make(root, error) from None


def _make_first_free(root: Path, stamp: str) -> Path:
    for number in itertools.count(1):
        folder = root / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            folder.mkdir(mode=FOLDER_MODE)
        except FileExistsError:
            continue
        folder.chmod(FOLDER_MODE)
        return folder
    raise AssertionError("numbers never end")


def open_run_dir(path: Path, *, resume: bool) -> RunFolder:
    """Return exactly this folder for a run; it is made if it does not exist.

    Raises:
        ConfigError: It is not empty and no resume was requested, or it cannot be made.
    """
    try:
        if path.is_dir() and any(path.iterdir()) and not resume:
            raise ConfigError("the run folder is not empty", where=f"--run-dir {path}", remedy=_RESUME)
        make_private_folder(path)
        path.chmod(FOLDER_MODE)
    except OSError as error:
        raise _cannot_make(path, error) from None
    return RunFolder(path)


def _cannot_make(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"the run folder cannot be made: {error.strerror}", where=str(path), remedy="give --runs-root")


def list_runs(root: Path) -> list[RunFolder]:
    """Return the runs under a root, the newest last, by the time at which they were made."""
    try:
        entries = [entry for entry in os.scandir(root) if entry.is_dir()]
    except OSError:
        return []
    runs = [RunFolder(Path(entry.path)) for entry in entries if _is_run(Path(entry.path))]
    return sorted(
        runs, key=lambda run: (run.info().created, run.id)
    )  # all times are UTC in one format, so text order is time order


def _is_run(path: Path) -> bool:
    return (path / "run.json").is_file()


def find_run(name: str, root: Path) -> RunFolder:
    """Return the run with this id, with an id that begins with this text, or at this path.

    The name of the embedded model is never the beginning of an id, so that it means the model in every command.

    Raises:
        ConfigError: No run matches, or several runs match.
    """
    if name and _is_run(Path(name)):
        return RunFolder(Path(name))
    runs = list_runs(root)
    if name == EMBEDDED_MODEL and not any(run.id == name for run in runs):
        near = next((run.id for run in reversed(runs) if run.id.startswith(f"{name}-")), None)
        remedy = f"the newest run of the demo is {near}" if near else "make one with lightning-hub demo"
        raise ConfigError(f"{name} is the name of the embedded model, not of a run", where="RUN", remedy=remedy)
    found = [run for run in runs if run.id == name] or [run for run in runs if name and run.id.startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(run.id for run in found[:5])
        raise ConfigError(f"{name!r} matches {len(found)} runs ({ids})", where="RUN", remedy="give more of the id")
    known = f"the newest is {runs[-1].id}" if runs else f"there are none in {root}"
    raise ConfigError(f"no run {name!r}; {known}", where="RUN", remedy="see lightning-hub runs list, or --runs-root")


def lock_run(folder: RunFolder) -> None:
    """Lock a run for writing until this process ends or calls ``unlock_run``.

    The lock has the pid, start time and boot id of its owner, so that the lock of an ended process can be replaced.

    Raises:
        ConfigError: A running process, or a process on another machine, has the lock.
    """
    descriptor = open_append(folder.lock)
    try:
        fcntl.flock(
            descriptor, fcntl.LOCK_EX
        )  # for this check only, so that of two processes one sees the other's entry
        owner = ProcessIdentity.from_json(read_json(folder.lock) or {})
        if owner is not None and owner != ProcessIdentity.own() and owner.is_alive() is not False:
            _refuse_locked(folder, owner)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(ProcessIdentity.own().to_json()).encode())
    finally:
        os.close(descriptor)


def _refuse_locked(folder: RunFolder, owner: ProcessIdentity) -> None:
    remedy = "stop it, or wait until it ends"
    if owner.is_alive() is None:
        remedy = f"if that process has ended, remove {folder.lock}"
    message = f"the run is in use by process {owner.pid} on {owner.host}"
    raise ConfigError(message, where=str(folder.path), remedy=remedy)


def unlock_run(folder: RunFolder) -> None:
    """Unlock the run; no effect if another process has the lock."""
    owner = ProcessIdentity.from_json(read_json(folder.lock) or {})
    if owner == ProcessIdentity.own():
        write_atomic(folder.lock, b"{}\n")
