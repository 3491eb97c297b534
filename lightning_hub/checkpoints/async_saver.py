"""Writes a checkpoint in a thread while training continues."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

import torch.distributed
from torch.distributed import ProcessGroup

from lightning_hub.parallel.collectives import Ranks


class AsyncSaver:
    """Runs one save at a time in a thread; the threads of all ranks have their own process group."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._fault: Exception | None = None
        self._group: ProcessGroup | None = None

    def ranks(self, *, alone: bool) -> Ranks:
        """Return the ranks whose threads save together; every rank must call this at the same time."""
        if alone or not torch.distributed.is_initialized():
            return Ranks(alone=True)
        if self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")
        return Ranks(group=self._group)

    def start(self, work: Callable[[], object]) -> None:
        """Start a save; the previous one must have ended."""
        assert self._thread is None, "the previous save has ended"

        def run() -> None:
            try:
                work()
            except Exception as error:  # raised by the training thread, in `ended`
                self._fault = error

        self._thread = Thread(
            target=run, name="checkpoint", daemon=True
        )  # a daemon: a hard stop does not wait for the disk
        self._thread.start()

    def ended(self, *, wait: bool) -> bool:
        """Return whether the save has ended on every rank; every rank must call this at the same step.

        Args:
            wait: Whether to wait for it.

        Raises:
            Exception: The error of the save, the same on every rank.
        """
        if not wait and not all(Ranks().all_gather_object(self._thread is None or not self._thread.is_alive())):
            return False
        Ranks().run_on_all(self._join)
        return True

    def _join(self) -> None:
        if self._thread is not None:  # only ranks that write have a thread
            self._thread.join()
        self._thread, fault, self._fault = None, self._fault, None
        if fault is not None:
            raise fault
