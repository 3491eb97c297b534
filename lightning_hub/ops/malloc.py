"""Keeps freed host memory in the process for the next step, with two options of glibc's malloc."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""The numbers of two options of glibc's ``mallopt`` (malloc.h)."""

TRIM_THRESHOLD_BYTES = 2**31 - 1
"""Free bytes at the end of the heap that are not returned to the system: the largest value of the option."""

MMAP_THRESHOLD_BYTES = 2**30
"""Bytes up to which a tensor is in the heap, so that its memory is reused; larger ones are mapped each time."""


def keep_freed_memory() -> bool:
    """Make this process keep the memory that it frees; return whether this works.

    A step frees its activations, and the next one allocates as much again. If the end of the heap is free, glibc
    returns it to the system in between, and then every page costs a page fault: tens of milliseconds in a step of one
    second. Peak memory does not grow. Nothing is changed if the environment has malloc settings, or with another C
    library.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is None:
        return False
    return bool(option(M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES) and option(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES))
