"""Ending a process of this machine that is known by more than its number."""

from __future__ import annotations

import os
import signal
import time

from lightning_hub.errors import ConfigError
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.process_identity import ProcessIdentity

_LIMIT = 10.0
"""Seconds in which a killed process is gone; only one that waits for a broken disk takes longer."""
_PERIOD = 0.02


def end_process(identity: ProcessIdentity, what: str, folder: RunFolder) -> None:
    """Kill exactly this process and wait until it is gone.

    Raises:
        ConfigError: It cannot be ended.
    """
    try:
        if identity.is_alive():
            os.kill(identity.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    except PermissionError:
        remedy = f"it belongs to another user: have it ended, or kill {identity.pid} as that user"
        raise ConfigError(
            f"{what} still runs as process {identity.pid}", where=str(folder.path), remedy=remedy
        ) from None
    end = time.monotonic() + _LIMIT
    while identity.is_alive():
        if time.monotonic() > end:
            message = f"{what} (process {identity.pid}) was killed and does not end"
            raise ConfigError(message, where=str(folder.path), remedy="it may wait for a disk that does not answer")
        time.sleep(_PERIOD)
