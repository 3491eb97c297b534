"""Host memory between steps: kept for the next one, where the C library would give it back and fetch it again."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""How glibc's ``mallopt`` numbers its options (malloc.h)."""

TRIM_THRESHOLD_BYTES = 2**31 - 1
"""Bytes at the end of the heap that stay there when they are free: as many as the option takes."""

MMAP_THRESHOLD_BYTES = 2**30
"""Bytes up to which a tensor lies in the heap, so that its place is used again; larger ones are mapped each time."""


def keep_freed_memory() -> bool:
    """Let this process keep what it frees; return whether it does.

    A step frees its activations, and the next one wants as much again. Where the end of the heap happens to be free
    glibc gives it back to the system in between, and every page of it costs a fault: tens of milliseconds in a step
    of one second. All that is kept has been in use before. A person's own settings and other C libraries are left
    alone.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is None:
        return False
    return bool(option(M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES) and option(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES))
