"""One of two ranks: trains with every strategy that this machine can run, and compares with one process.

usage: python -m lightning_hub.doctor.rank FOLDER, as one of two ranks
"""

from __future__ import annotations

import os
import sys
from itertools import chain
from pathlib import Path

import torch
import torch.distributed
from lightning.pytorch.strategies import Strategy

from lightning_hub.doctor.findings import Finding, equality, write_findings
from lightning_hub.doctor.recorded_run import (
    ProofFiles,
    RecordedRun,
    accelerator,
    distance,
    max_distance,
    train_recorded,
    worst_distance,
)
from lightning_hub.launch.environment import detect_process
from lightning_hub.parallel.process_group import destroy_process_group, init_process_group
from lightning_hub.parallel.strategies import DDP, FSDP, ModelParallel
from lightning_hub.parent import die_with_parent

RANKS_BOUND = 1e-5
"""Bound of relative errors in float32: sums over ranks have another order."""


def strategies() -> dict[str, Strategy]:
    """Return the strategies that two ranks can run."""
    return {"ddp": DDP(), "fsdp": FSDP(), "model_parallel, tp 2": ModelParallel(([1, 2], ["fsdp", "tp"]))}


def main(folder: Path) -> None:
    """Train with each strategy; rank 0 writes the findings."""
    die_with_parent()
    os.environ["LIGHTNING_HUB_CACHE"] = str(folder / "cache")
    place, device, material = detect_process(os.environ), accelerator(), ProofFiles(folder)
    assert place is not None, "this process is one of several"
    environment = init_process_group(place, on_gpu=device == "cuda")
    expected = RecordedRun(**torch.load(material.reference, weights_only=True))
    findings = []
    for name, strategy in strategies().items():
        module, _ = train_recorded(material, device, strategy, environment)
        findings.append(_finding(name, module.seen, expected, device))
    if place.rank == 0:
        write_findings(findings, folder / "rank.json")
    destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # strategies keep process groups whose threads can abort a normal exit


def _finding(name: str, seen: RecordedRun, expected: RecordedRun, device: str) -> Finding:
    errors = [worst_distance(seen.losses, expected.losses), worst_distance(seen.norms, expected.norms)]
    errors += [distance([seen.weights[key]], [tensor]) for key, tensor in expected.weights.items() if seen.weights]
    gathered: list[list[float]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, errors)
    of = f"losses, gradient norms and final weights over {len(expected.losses)} steps, on {device}"
    return equality(f"2 ranks = 1 rank: {name}", max_distance([*chain(*gathered)]), RANKS_BOUND, of)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
