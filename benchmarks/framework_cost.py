"""What the trainer costs beyond its kernels: ``lightning-hub fit`` beside a bare PyTorch loop on the same rows.

Contenders run one after another in processes of their own, in alternated rounds, with one thread, and are compared
by CPU time over the same steps, warm-up left out: ``ratio`` by the sum of the steps, ``+ms`` by the median of their
differences step by step. The losses of every step must agree before a ratio is printed.

usage: python -m benchmarks.framework_cost [--rounds 3] [--steps 25] [--tiny-steps 320] [--only small | tiny]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.clock import Notes
from benchmarks.records import ONE_THREAD, alternated, child_environment, middle, record, spread, table
from benchmarks.work import SHAPES, chat_lengths, make_model, make_rows
from lightning_hub.runs.files import Json

CONTENDERS = ("raw", "ours", "raw-full-logits")
SAME_LOSS = 1e-5


@dataclass(frozen=True)
class Case:
    """One model and the steps that are run on it.

    Attributes:
        shape: Name of the shape.
        tokens: Tokens of a row; a step is one row.
        mean: Mean length of a document.
        steps: Steps in all.
        warm_up: Steps at the beginning that are not counted.
    """

    shape: str
    tokens: int
    mean: int
    steps: int
    warm_up: int


@dataclass(frozen=True)
class Round:
    """What one contender took in one round."""

    losses: list[float]
    step_ms: list[float]
    peak_mib: float

    @property
    def cpu_ms(self) -> float:
        """Mean CPU time of a step."""
        return sum(self.step_ms) / len(self.step_ms)

    def extra_ms(self, other: Round) -> float:
        """Return the median of what each step took longer than the same step of another contender."""
        return middle([mine - theirs for mine, theirs in zip(self.step_ms, other.step_ms, strict=True)])


def measure(
    case: Case, rounds: int, seed: int, work: Path, contenders: Sequence[str] = CONTENDERS
) -> dict[str, list[Round]]:
    """Run contenders in turn."""
    shape = SHAPES[case.shape]
    make_model(work / "model", shape, seed)
    count = 2 * case.steps * case.tokens // case.mean  # twice what the steps take: an epoch must not end in between
    make_rows(work / "rows.jsonl", chat_lengths(count, case.mean, case.tokens, seed), shape.vocab_size, seed)
    found: dict[str, list[Round]] = {name: [] for name in contenders}
    for number, name in alternated(contenders, rounds):
        notes = _run(case, name, work, work / f"{name}-{number}.json")
        step_ms = [1e3 * (end - start) for start, end in pairwise(notes["cpu"][case.warm_up - 1 :])]
        found[name].append(Round(notes["losses"], step_ms, notes["peak_mib"]))
        print(f"  {case.shape} round {number + 1} {name}: {found[name][-1].cpu_ms:.2f} CPU ms a step", flush=True)
    return found


def _run(case: Case, name: str, work: Path, out: Path) -> Notes:
    command = [sys.executable, "-m", "benchmarks.contenders", name, "--work", str(work), "--out", str(out)]
    command += ["--steps", str(case.steps), "--tokens", str(case.tokens)]
    environment = child_environment(**ONE_THREAD, LIGHTNING_HUB_CACHE=str(work / "cache"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    notes: Notes = json.loads(out.read_text(encoding="utf-8"))
    return notes


def largest_difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Return the largest relative difference of two series of losses."""
    return max(abs(one - other) / abs(other) for one, other in zip(losses, reference, strict=True))


def report(case: Case, found: dict[str, list[Round]]) -> dict[str, Json]:
    """Print the table of a case and return its figures; the first contender is what others are compared with.

    Raises:
        SystemExit: The losses differ, so that the contenders did not do the same work.
    """
    first = next(iter(found))
    base = found[first]
    rows, figures = [], {}
    for name, rounds in found.items():
        worst = max(largest_difference(one.losses, other.losses) for one, other in zip(rounds, base, strict=True))
        if worst > SAME_LOSS:
            raise SystemExit(f"{name} does other work than {first}: losses differ by {worst:.1e}, relative")
        ratios = [other.cpu_ms / one.cpu_ms for one, other in zip(rounds, base, strict=True)]
        extra = [one.extra_ms(other) for one, other in zip(rounds, base, strict=True)]
        line = {
            "cpu_ms": round(middle([one.cpu_ms for one in rounds]), 3),
            "ratio_to_raw": round(middle(ratios), 4),
            "ratio_spread": round(spread(ratios), 4),
            "extra_ms": round(middle(extra), 3),
            "extra_spread": round(spread(extra), 3),
            "peak_mib": round(max(one.peak_mib for one in rounds)),
            "loss_difference": worst,
        }
        figures[name] = line
        rows.append((name, *(f"{value:.1e}" if key == "loss_difference" else value for key, value in line.items())))
    head = ("contender", "CPU ms", "ratio", "spread", "+ms", "spread", "peak MiB", "loss diff")
    print(f"\n{case.shape}: {case.steps - case.warm_up} steps of {case.tokens} tokens, {len(base)} rounds, one thread")
    table(head, rows)
    begin, end = base[0].losses[0], base[0].losses[-1]
    return {"steps": case.steps, "warm_up": case.warm_up, "tokens": case.tokens, "first_loss": begin, "last_loss": end,
            "contenders": {name: dict(line) for name, line in figures.items()}}  # fmt: skip


def main() -> None:
    """Measure both cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25, help="steps of the small model, the first 5 to warm up")
    parser.add_argument("--tiny-steps", type=int, default=320, help="steps of the tiny model, the first 20 to warm up")
    parser.add_argument("--only", choices=("small", "tiny"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    cases = [
        Case("small", tokens=2048, mean=200, steps=given.steps, warm_up=5),
        Case("tiny", tokens=64, mean=30, steps=given.tiny_steps, warm_up=20),
    ]
    os.environ.update(ONE_THREAD)
    results: dict[str, Json] = {"rounds": given.rounds, "seed": given.seed}
    for case in cases:
        if given.only in (None, case.shape):
            with tempfile.TemporaryDirectory() as scratch:
                results[case.shape] = report(case, measure(case, given.rounds, given.seed, Path(scratch)))
    record("framework_cost", results)


if __name__ == "__main__":
    main()
