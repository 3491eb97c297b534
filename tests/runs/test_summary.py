from __future__ import annotations

import time
from pathlib import Path

from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.metrics import MetricsWriter
from lightning_hub.runs.summary import run_summary
from lightning_hub.runs.timings import PhaseTimer


def test_the_end_of_a_run_prints_its_result(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "sft-x")
    folder.path.mkdir()
    writer = MetricsWriter(folder.metrics, 1)
    writer.write(0, {"val_loss": 9.0})
    for step, loss, rate in ((1, 8.0, 10.0), (2, 4.0, 300.0), (3, 2.0, 200.0)):
        writer.write(step, {"loss": loss, "tokens_per_second": rate})
    writer.write(2, {"val_loss": 3.0})
    writer.write(3, {"val_loss": 3.5})
    writer.close()
    folder.export.mkdir()
    said = "\n".join(run_summary(folder, {"imports": 4.0, "steps": 61.2, "export": 0.001}, memory_gb=1.25))
    for part in (
        "done   3 steps, 1 min 05 s in all, 200 tokens/s",
        "loss   8.0000 -> 2.0000",
        "val    9.0000 -> 3.5000 (best 3.0000 after step 2)",
        "memory 1.2 GB at the peak, of the process",
        "time   imports 4.0 s, steps 1 min 01 s",
        f"run    {folder.path}",
        f"export {folder.export}",
        "lightning-hub chat sft-x",
    ):
        assert part in said, said


def test_phases_add_up_to_the_age_of_the_process() -> None:
    timer = PhaseTimer()
    timer.enter("data")
    timer.enter("steps")
    assert timer.enter("data") == "steps"
    found = timer.seconds()
    assert list(found) == ["imports", "data", "steps"]
    before, after = sum(found.values()), sum(timer.seconds().values())
    assert 0 < before <= after
    assert timer.phase == "data"
    assert abs(time.monotonic() - timer._since) < 5
