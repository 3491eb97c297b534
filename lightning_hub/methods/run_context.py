"""Settings that a run gives to every module that it constructs; a recipe cannot set them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunContext:
    """How the weights of a module are loaded, and where they stay after training.

    Attributes:
        trust_remote_code: Whether Python files of the model may run. Only a command-line flag sets it.
        resume_from: The checkpoint that is loaded into the model after it is built; None for a new run.
        stays_on_device: Whether the weights stay on their device at the end of a training, and the optimizer is
            freed. Lightning moves both to the host, which took 9 s for 1.5 billion parameters on one GPU. A process
            that exports next and then ends needs neither.
    """

    trust_remote_code: bool = False
    resume_from: Path | None = None
    stays_on_device: bool = False


_DEFAULT = RunContext()
_current: ContextVar[RunContext] = ContextVar("run_context", default=_DEFAULT)


def current_run() -> RunContext:
    """Return the context in which modules are constructed now."""
    return _current.get()


@contextmanager
def run_context(context: RunContext) -> Iterator[None]:
    """Set the context in which modules are constructed.

    The parser constructs them from the options of a recipe, with signatures that methods of users define, so the
    context cannot be an argument.
    """
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)
