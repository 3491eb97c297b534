"""Writing a checkpoint in a thread while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

import torch.distributed
from torch.distributed import ProcessGroup

from lightning_hub.parallel.collectives import Ranks


class AsyncSaver:
    """One save at a time, in a thread that talks to those of the other ranks through a process group of its own."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._fault: Exception | None = None
        self._group: ProcessGroup | None = None

    def ranks(self, *, alone: bool) -> Ranks:
        """Return the processes whose threads work together; every rank must call this at the same time."""
        if alone or not torch.distributed.is_initialized():
            return Ranks(alone=True)
        if self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")
        return Ranks(group=self._group)

    def start(self, work: Callable[[], object]) -> None:
        """Begin; what was begun before has ended."""
        assert self._thread is None, "the save before has been waited for"

        def run() -> None:
            try:
                work()
            except Exception as error:  # raised where the training waits for this
                self._fault = error

        self._thread = Thread(target=run, name="checkpoint", daemon=True)  # a hard stop does not wait for a disk
        self._thread.start()

    def ended(self, *, wait: bool) -> bool:
        """Return whether the save has ended on every rank; every rank must ask at the same step.

        Args:
            wait: Whether to wait for it.

        Raises:
            Exception: What went wrong in it, the same on every rank.
        """
        if not wait and not all(Ranks().all_gather_object(self._thread is None or not self._thread.is_alive())):
            return False
        Ranks().run_on_all(self._join)
        return True

    def _join(self) -> None:
        if self._thread is not None:  # a rank that writes nothing has none
            self._thread.join()
        self._thread, fault, self._fault = None, self._fault, None
        if fault is not None:
            raise fault
