"""One of two ranks: trains under every strategy that this machine can run, and compares with one process.

usage: python -m lightning_hub.proof.rank FOLDER, with the environment of torchrun
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed
from lightning.pytorch.strategies import Strategy

from lightning_hub.parallel.strategies import DDP, FSDP, ModelParallel
from lightning_hub.proof.children import end_with_parent
from lightning_hub.proof.findings import Finding, equality, write_findings
from lightning_hub.proof.training import Material, Seen, accelerator, distance, largest, train, worst

BOUND = 1e-5
"""Bound of relative errors in float32: sums over ranks are made in another order."""


def strategies() -> dict[str, Strategy]:
    """Return what two ranks can run."""
    return {"ddp": DDP(), "fsdp": FSDP(), "model_parallel, tp 2": ModelParallel(([1, 2], ["fsdp", "tp"]))}


def main(folder: Path) -> None:
    """Train, and let rank 0 write what was found."""
    end_with_parent()
    material, device = Material(folder), accelerator()
    expected = Seen(**torch.load(material.reference, weights_only=True))
    findings = [
        _finding(name, train(material, strategy, 2, device)[0].seen, expected, device)
        for name, strategy in strategies().items()
    ]
    if os.environ["RANK"] == "0":
        write_findings(findings, folder / "rank.json")
    sys.stdout.flush()
    os._exit(0)  # what the strategies leave behind of their groups need not be taken down one by one


def _finding(name: str, seen: Seen, expected: Seen, device: str) -> Finding:
    errors = [worst(seen.losses, expected.losses), worst(seen.norms, expected.norms)]
    errors += [distance([seen.weights[key]], [tensor]) for key, tensor in expected.weights.items() if seen.weights]
    gathered: list[list[float]] = [[], []]
    torch.distributed.all_gather_object(gathered, errors)
    of = f"losses, gradient norms and final weights over {len(expected.losses)} steps, on {device}"
    return equality(f"2 ranks = 1 rank: {name}", largest(sum(gathered, [])), BOUND, of)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
