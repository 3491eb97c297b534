"""Ends a process of this machine, after a check of its identity."""

from __future__ import annotations

import os
import signal
import time

from lightning_hub.errors import ConfigError
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.process_identity import ProcessIdentity

_LIMIT = 10.0
"""Seconds in which a killed process must end; a process that waits for a broken disk can take longer."""
_PERIOD = 0.02


def end_process(identity: ProcessIdentity, what: str, folder: RunFolder) -> None:
    """Kill exactly this process and wait until it has ended.

    Raises:
        ConfigError: The process cannot be ended.
    """
    try:
        if identity.is_alive():
            os.kill(identity.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    except PermissionError:
        remedy = f"it belongs to another user: run kill {identity.pid} as that user"
        raise ConfigError(
            f"{what} still runs as process {identity.pid}", where=str(folder.path), remedy=remedy
        ) from None
    end = time.monotonic() + _LIMIT
    while identity.is_alive():
        if time.monotonic() > end:
            message = f"{what} (process {identity.pid}) was killed but does not end"
            remedy = "it may wait for a disk that does not respond: check the disk and try again"
            raise ConfigError(message, where=str(folder.path), remedy=remedy)
        time.sleep(_PERIOD)
