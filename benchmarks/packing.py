"""How long it takes to share a million samples out into rows, and how full the rows are.

usage: python -m benchmarks.packing [--samples 1000000] [--rounds 3] [--seed 0]
"""

from __future__ import annotations

import argparse
import time

from benchmarks.records import middle, record, table
from benchmarks.work import chat_lengths
from lightning_hub.data.packing import pack, packing_efficiency
from lightning_hub.runs.files import Json

CASES = ((200, 2048, 2048), (200, 2048, 8192), (700, 8192, 8192))
"""Mean length, longest length, tokens of a row."""


def measure(mean: int, longest: int, capacity: int, samples: int, rounds: int, seed: int) -> dict[str, float]:
    """Pack the same lengths several times; return medians."""
    lengths = chat_lengths(samples, mean, longest, seed)
    wall, cpu = [], []
    for _ in range(rounds):
        began, began_cpu = time.perf_counter(), time.process_time()
        rows = pack(lengths, capacity)
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
    return {
        "mean": round(float(lengths.mean()), 1),
        "longest": int(lengths.max()),
        "capacity": capacity,
        "rows": len(rows),
        "fill": round(packing_efficiency(rows, lengths, capacity), 5),
        "seconds": round(middle(wall), 3),
        "cpu_seconds": round(middle(cpu), 3),
    }


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    cases = [measure(*case, given.samples, given.rounds, given.seed) for case in CASES]
    table(["mean", "longest", "row", "rows", "fill", "s", "CPU s"], [list(case.values()) for case in cases])
    listed: list[Json] = [dict(case) for case in cases]
    record("packing", {"samples": given.samples, "rounds": given.rounds, "seed": given.seed, "cases": listed})


if __name__ == "__main__":
    main()
