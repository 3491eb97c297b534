"""The number of GPUs of this machine, read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_DRIVER = Path("/proc/driver/nvidia/gpus")


def visible_gpus(environ: Mapping[str, str], driver: Path = _DRIVER) -> int:
    """Return the number of GPUs that CUDA_VISIBLE_DEVICES leaves of those that the driver lists."""
    present = len(list(driver.iterdir())) if driver.is_dir() else 0
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not present:
        return present
    listed: list[str] = []
    for entry in (part.strip() for part in chosen.split(",")):
        if not entry or entry == "-1":
            break  # CUDA stops at the first index that is not valid
        listed.append(entry)
    return len(listed)
