"""Commands in processes of their own that import nothing: they are forked from one that has imported everything.

Importing torch, lightning, transformers and peft takes seconds of a processor. Where a test is about what happens in a
run and not about how a process starts, its processes come from here: real ones, with their own pid, signals, exit
code and streams, whose ranks are their children. What is not so is that a new interpreter begins.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from tests.conftest import PATIENCE

IMPORTED = [
    "tests.warm",
    "tests.parallel.multiprocess",
    "tests.parallel.resume_cases",
    "lightning_hub.methods.lora",
    "lightning_hub.methods.osft",
    "lightning_hub.training.worker",
    "lightning_hub.doctor.single_rank",
    "lightning_hub.doctor.rank",
    "lightning_hub.doctor.resumed",
]
"""What most processes need, loaded once."""


def warm_context() -> ForkServerContext:
    """Return what starts processes that have everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def as_own_process() -> None:
    """Make a process that was forked from the fork server what a new one would be."""
    # Loader workers begin as those of a real rank do; else they would be those of a fork server, and import torch anew.
    multiprocessing.set_start_method("fork", force=True)
    import torch  # this module is loaded by tests that need no torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


class Warm:
    """A command of ``lightning-hub``, or another module, that runs in a process of its own.

    Args:
        argv: ``-m MODULE ARGUMENTS``.
        folder: Where its output is kept.
        env: Variables beside those of this process.
        first: What the process does before the command, as it would in an interpreter with a fault in it; the
            processes that it starts inherit that. It must be importable.
    """

    def __init__(
        self,
        argv: Sequence[str],
        folder: Path,
        *,
        env: Mapping[str, str] | None = None,
        first: Callable[[], object] | None = None,
    ) -> None:
        number = len(list(folder.glob("warm-*.out")))
        self.out, self.err = folder / f"warm-{number}.out", folder / f"warm-{number}.err"
        for path in (self.out, self.err):
            path.touch()
        streams = partial(_lead_to_files, self.out, self.err)
        work = partial(_first, (streams, first) if first else (streams,))
        self._process = warm_context().Process(target=_run, args=(list(argv), {**os.environ, **(env or {})}, work))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def wait(self, limit: float = PATIENCE) -> int:
        """Return its exit code, below 0 the signal that killed it."""
        self._process.join(limit)
        assert self._process.exitcode is not None, f"{self.err.read_text()}\nit did not end within {limit} s"
        return self._process.exitcode

    def finished(self, limit: float = PATIENCE) -> tuple[int, str, str]:
        """Wait for its end and return its exit code and what it has printed."""
        return self.wait(limit), self.out.read_text(), self.err.read_text()

    def kill(self) -> None:
        self._process.kill()

    def wait_for_error(self, part: str, limit: float, after: int = 0) -> tuple[str, int]:
        """Wait until a line of its standard error has a part; return the line and where the next begins."""
        end = time.monotonic() + limit
        while True:
            text = self.err.read_text()
            place = after
            for line in text[after:].splitlines(keepends=True):
                place += len(line)
                if line.endswith("\n") and part in line:
                    return line, place
            assert time.monotonic() < end, f"{part!r} was not said:\n{text}"
            time.sleep(0.02)


def hub(*words: str) -> list[str]:
    """Return the arguments of an interpreter that runs a command of ours."""
    return ["-m", "lightning_hub", *words]


def warm_run(folder: Path, argv: list[str]) -> int:
    """Run a command of ours in a process of its own, print what it prints, and return its exit code."""
    code, out, err = Warm(hub(*argv), folder).finished()
    print(out, end="")
    print(err, end="", file=sys.stderr)
    return code


def _first(steps: Sequence[Callable[[], object]]) -> None:
    for step in steps:
        step()


def _lead_to_files(out: Path, err: Path) -> None:
    for path, number in ((out, 1), (err, 2)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)


def _run(argv: list[str], environ: dict[str, str], first: Callable[[], None]) -> NoReturn:
    os.environ.clear()
    os.environ.update(environ)
    as_own_process()
    from lightning_hub.doctor import children
    from lightning_hub.launch import local

    starts: Any = SimpleNamespace(**{name: getattr(subprocess, name) for name in subprocess.__all__})
    starts.Popen = Forked
    local.subprocess = children.subprocess = starts  # type: ignore[attr-defined]
    first()
    _open_streams()
    _become(argv)


def _open_streams() -> None:
    """Open the standard streams on what their descriptors are now, as a new interpreter does."""
    opened: list[Any] = []
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened.append(None)
            continue
        buffering = 1 if number == 2 or os.isatty(number) else -1
        errors = "backslashreplace" if number == 2 else "strict"
        mode = "w" if number else "r"
        opened.append(open(number, mode, buffering, encoding="utf-8", errors=errors, closefd=False))  # noqa: SIM115
    sys.stdin, sys.stdout, sys.stderr = opened
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = opened  # type: ignore[misc]


def _become(argv: Sequence[str]) -> NoReturn:
    """Run ``-m MODULE ARGUMENTS`` in this process and end it as an interpreter would."""
    flag, module, *arguments = argv
    assert flag == "-m"
    code: object = 0
    try:
        if module == "lightning_hub":
            sys.argv = ["lightning-hub", *arguments]
            from lightning_hub.__main__ import main

            main()
        else:
            sys.argv = [module, *arguments]
            sys.modules.pop(module, None)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    assert isinstance(code, int)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            code = code or 120  # as an interpreter says it
    os._exit(code)


class Forked:
    """What ``subprocess.Popen`` is to a process that starts interpreters: a fork of that process in their place."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: int,
        stdout: Any,
        stderr: int,
        start_new_session: bool,
        pass_fds: Sequence[int] = (),
    ) -> None:
        assert (stdin, start_new_session) == (subprocess.DEVNULL, True)
        self.returncode: int | None = None
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()  # else the child would print it, too
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._begin(argv, env, stdout, stderr, pass_fds)
            finally:
                os._exit(1)

    def _begin(
        self, argv: Sequence[str], env: Mapping[str, str], stdout: Any, stderr: int, pass_fds: Sequence[int]
    ) -> None:
        os.setsid()
        out = stdout if isinstance(stdout, int) else stdout.fileno()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(1 if stderr == subprocess.STDOUT else stderr, 2)
        for name in [path.name for path in Path("/proc/self/fd").iterdir()]:
            if int(name) > 2 and int(name) not in pass_fds:
                with suppress(OSError):  # the one that listed them is closed
                    os.close(int(name))
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.set_wakeup_fd(-1)
        os.environ.clear()
        os.environ.update(env)
        atexit._clear()  # those of the parent: they would remove its temporary folders
        from lightning_hub import parent

        parent.die_with_parent.cache_clear()
        if parent.SUPERVISOR_VARIABLE in env:
            parent.die_with_parent()  # as the package does when it is imported
        as_own_process()
        _open_streams()
        _become(argv[next(place for place, word in enumerate(argv) if word == "-m") :])

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode


def after_step_3(event: str) -> None:
    """Make something happen right after the third step, in this process and in those that are forked from it.

    The event is a statement; it may speak of ``self`` (the recorder), ``trainer`` and ``module``.
    """
    from lightning_hub.callbacks.recorder import Recorder

    plain: Any = Recorder.on_train_batch_end
    code = compile(event, "event", "exec")

    def then(self: Any, trainer: Any, module: Any, *rest: Any) -> None:
        plain(self, trainer, module, *rest)
        if trainer.global_step == 3:
            exec(code, {"os": os, "signal": signal, "self": self, "trainer": trainer, "module": module})

    Recorder.on_train_batch_end = then  # type: ignore[assignment, method-assign]
