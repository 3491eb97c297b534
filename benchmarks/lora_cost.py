"""What the trainer costs LoRA: ``lightning-hub fit`` beside a bare loop with peft, on the same rows.

As ``benchmarks.framework_cost`` measures it for SFT: CPU time, one thread, alternated rounds, equal losses.

usage: python -m benchmarks.lora_cost [--rounds 3] [--steps 25]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from benchmarks.framework_cost import Case, measure, report
from benchmarks.records import ONE_THREAD, record

CONTENDERS = ("lora-raw", "lora")


def main() -> None:
    """Measure the small model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25, help="steps, the first 5 to warm up")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    case = Case("small", tokens=2048, mean=200, steps=given.steps, warm_up=5)
    os.environ.update(ONE_THREAD)
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(case, given.rounds, given.seed, Path(scratch), CONTENDERS)
        record("lora_cost", {"rounds": given.rounds, "seed": given.seed, case.shape: report(case, found)})


if __name__ == "__main__":
    main()
