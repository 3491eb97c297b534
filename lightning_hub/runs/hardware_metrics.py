"""``gauges.json``: the load of a node, every few seconds."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from pathlib import Path

import psutil

from lightning_hub.runs.files import Json, write_json
from lightning_hub.runs.folder import now

GIGABYTE = 1e9


class HardwareMetrics:
    """Reads the load of this machine and its GPUs; rates are means since the last reading.

    Args:
        path: The file of the readings.
        disk: A path on the disk whose free space is read.
    """

    def __init__(self, path: Path, disk: Path) -> None:
        self.path = path
        self.disk = disk
        self._gpus = _Gpus()
        self._since = time.monotonic()
        self._counters = _counters()
        psutil.cpu_percent()  # the first call returns 0, it only starts the measurement

    def write(self) -> None:
        """Write one reading.

        Raises:
            OSError: It could not be written.
        """
        write_json(self.path, self.read())

    def read(self) -> dict[str, Json]:
        """Return one reading: shares in percent, sizes in GB, rates in bytes per second, temperatures in °C."""
        before, self._counters = self._counters, _counters()
        seconds, self._since = time.monotonic() - self._since, time.monotonic()
        memory = psutil.virtual_memory()
        rates: dict[str, Json] = {
            name: round((self._counters[name] - before[name]) / max(seconds, 1e-3)) for name in before
        }
        return {
            "time": now(),
            "cpu_percent": psutil.cpu_percent(),
            "load": round(psutil.getloadavg()[0], 2),
            "memory_gb": round((memory.total - memory.available) / GIGABYTE, 2),
            "memory_total_gb": round(memory.total / GIGABYTE, 2),
            "disk_free_gb": round(shutil.disk_usage(self.disk).free / GIGABYTE, 2),
            **rates,
            "gpus": self._gpus.read(),
        }


def _counters() -> dict[str, int]:
    network, disk = psutil.net_io_counters(), psutil.disk_io_counters()
    return {
        "network_sent": network.bytes_sent if network else 0,
        "network_received": network.bytes_recv if network else 0,
        "disk_read": disk.read_bytes if disk else 0,
        "disk_written": disk.write_bytes if disk else 0,
    }


class _Gpus:
    """Readings of NVML; empty if its library (the extra ``gpu``) or a driver is missing."""

    def __init__(self) -> None:
        self._handles = []
        try:
            import pynvml  # in the function, because it is optional
        except ImportError:
            return
        self._nvml = pynvml
        with suppress(pynvml.NVMLError):  # no driver, no GPU
            pynvml.nvmlInit()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]

    def read(self) -> list[Json]:
        """Return load, memory and temperature of each GPU."""
        found: list[Json] = []
        for index, handle in enumerate(self._handles):
            memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
            found.append(
                {
                    "index": index,
                    "percent": self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
                    "memory_gb": round(memory.used / GIGABYTE, 2),
                    "memory_total_gb": round(memory.total / GIGABYTE, 2),
                    "temperature": self._nvml.nvmlDeviceGetTemperature(handle, self._nvml.NVML_TEMPERATURE_GPU),
                }
            )
        return found
