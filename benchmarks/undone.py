"""Which changes make a model forget: what it knows of its first task when the change of one weight is taken back.

The model is that of ``benchmarks.forgetting``'s first scene after both further tasks.

usage: python -m benchmarks.undone [--seed 3] [--method osft] [--rate 1e-3] [--steps 300] [--quick]
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.forgetting import stages
from benchmarks.keepers import NAMES, targets
from benchmarks.records import record, table
from benchmarks.scenes import Room
from lightning_hub.runs.files import Json


def main() -> None:
    """Teach, take back one change after another, test, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--method", choices=NAMES, default="osft")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs; no record")
    given = parser.parse_args()
    torch.set_num_threads(1)
    scene, steps = (Room(steps=10), 4) if given.quick else (Room(), given.steps)
    plain = scene.model(given.seed)
    *_, (taught, _) = stages(scene, given.method, given.rate, given.seed, steps)
    found: dict[str, Json] = {"nothing": round(scene.test(taught, 0, given.seed), 4)}
    for matrix in targets(plain):
        weight, before = taught.get_parameter(matrix.full_name), plain.get_parameter(matrix.full_name)
        after = weight.detach().clone()
        weight.data.copy_(before)
        found[matrix.module] = round(scene.test(taught, 0, given.seed), 4)
        weight.data.copy_(after)
    table(("taken back", "right on the first task"), list(found.items()))
    if not given.quick:
        settings: dict[str, Json] = {"seed": given.seed, "method": given.method, "rate": given.rate, "steps": steps}
        record("undone", {**settings, "taken_back": found})


if __name__ == "__main__":
    main()
