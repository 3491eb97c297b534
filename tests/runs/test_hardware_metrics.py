from __future__ import annotations

import json
from pathlib import Path

import psutil

from lightning_hub.runs.hardware_metrics import HardwareMetrics


def test_readings_are_those_of_the_machine(tmp_path: Path) -> None:
    gauges = HardwareMetrics(tmp_path / "gauges.json", tmp_path)
    (tmp_path / "some").write_bytes(b"x" * 1000)
    gauges.write()
    found = json.loads((tmp_path / "gauges.json").read_text())
    assert found["memory_total_gb"] == round(psutil.virtual_memory().total / 1e9, 2)
    assert 0 < found["memory_gb"] < found["memory_total_gb"]
    assert 0 <= found["cpu_percent"] <= 100
    assert found["disk_free_gb"] > 0
    assert all(found[name] >= 0 for name in ("network_sent", "network_received", "disk_read", "disk_written"))
    assert isinstance(found["gpus"], list)
