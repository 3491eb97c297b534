"""Resumes a stopped run and compares it with a run that was not stopped.

usage: python -m lightning_hub.doctor.resumed FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import load_file

from lightning_hub.cli import run
from lightning_hub.doctor.findings import equality, write_findings
from lightning_hub.doctor.recorded_run import max_distance
from lightning_hub.errors import ExitCode
from lightning_hub.parent import die_with_parent
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.metrics import as_number, read_metrics

RESUMED_BOUND = 0.0


def main(folder: Path) -> int:
    """Resume the run with the command that a user gives, and compare."""
    die_with_parent()
    straight, stopped = RunFolder(folder / "straight"), RunFolder(folder / "stopped")
    assert not stopped.export.exists(), "the run was stopped before its end"
    before = len(read_metrics(stopped))
    code = run(["runs", "resume", str(stopped.path)])
    if code != ExitCode.DONE:
        return code
    ours, theirs = _losses(stopped), _losses(straight)
    assert 0 < before < len(theirs), "the run was stopped between its first and last step"
    of = f"{len(theirs)} steps with noise, stopped after step {before}"
    weights = [load_file(made.export / "model.safetensors") for made in (stopped, straight)]
    apart = [float((weights[0][name] - tensor).abs().max()) for name, tensor in weights[1].items()]
    findings = [
        equality(
            "resumed = straight: losses", _largest_difference(ours, theirs), RESUMED_BOUND, f"{of}; largest difference"
        ),
        equality("resumed = straight: weights", max_distance(apart), RESUMED_BOUND, f"{of}; largest difference"),
    ]
    write_findings(findings, folder / "resumed.json")
    return ExitCode.DONE


def _losses(made: RunFolder) -> dict[int, float]:
    lines = read_metrics(made)
    found = {int(line["step"] or 0): as_number(line["loss"]) for line in lines if "loss" in line}
    return {step: loss for step, loss in found.items() if loss is not None}


def _largest_difference(ours: dict[int, float], theirs: dict[int, float]) -> float:
    """Return the largest difference; infinity if the runs do not have the same steps."""
    if ours.keys() != theirs.keys():
        return float("inf")
    return max_distance([abs(ours[step] - theirs[step]) for step in theirs])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
