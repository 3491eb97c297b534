"""How long commands take from the start of the process: the light verbs, and ``fit`` to the end of its first step.

A light verb is measured as a whole process; that it loads nothing heavy is asked of a second one. ``fit`` trains the
embedded model on its own data; ``raw`` is a script of the same imports that tokenises the same chats and makes one
step with a stock model and a plain loop.

usage: python -m benchmarks.startup [--rounds 5] [--runs 200]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.clock import Notes
from benchmarks.records import ONE_THREAD, alternated, child_environment, middle, record, table
from lightning_hub.demo.tasks import SHOUT, conversations
from lightning_hub.runs.files import Json
from lightning_hub.runs.folder import create_run
from lightning_hub.runs.metrics import MetricsWriter
from lightning_hub.runs.writer import NewRun, RunWriter

HEAVY = ("torch", "lightning", "transformers", "numpy", "jsonargparse")
ROWS = 4000
"""Chats that the first step is preceded by: read, rendered and tokenised."""

WHICH_HEAVY = f"""
import contextlib, io, json, sys
from lightning_hub.cli import run
with contextlib.redirect_stdout(io.StringIO()):
    run(sys.argv[1:])
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
"""

RAW = Path(__file__).with_name("raw_step.py")


@dataclass(frozen=True)
class Cost:
    """Seconds of one process, by both clocks."""

    wall: float
    cpu: float


def whole(command: list[str], environment: dict[str, str]) -> Cost:
    """Run a command to its end."""
    before, began = os.times(), time.perf_counter()
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    wall, after = time.perf_counter() - began, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Cost(wall, cpu)


def to_first_step(command: list[str], out: Path, environment: dict[str, str]) -> Cost:
    """Run a trainer that notes the end of its first step."""
    began = time.time()
    subprocess.run(command, env=environment, capture_output=True, check=True)
    notes: Notes = json.loads(out.read_text(encoding="utf-8"))
    return Cost(notes["wall"][0] - began, notes["cpu"][0])


def make_runs(root: Path, count: int) -> None:
    """Write finished runs, each with fifty lines of metrics."""
    for _ in range(count):
        folder = create_run("bench", root)
        writer = RunWriter.create(folder, NewRun(name="bench", method="sft", model="demo", config="{}\n"))
        metrics = MetricsWriter(folder.metrics, attempt=1)
        for step in range(1, 51):
            metrics.write(step, {"loss": 1 / step, "lr": 1e-5, "tokens": 2048 * step, "tokens_per_second": 1e4})
        metrics.close()
        writer.set_status("finished", step=50, max_steps=50, exit_code=0)
        writer.close()


def light_verbs(rounds: int, runs: int, scratch: Path) -> dict[str, Json]:
    """Measure the verbs that must not load anything heavy."""
    root = scratch / "runs"
    make_runs(root, runs)
    environment = child_environment(**ONE_THREAD)
    verbs = {"--help": ["--help"], "--version": ["--version"], "runs list": ["runs", "list", "--runs-root", str(root)]}
    bare = [sys.executable, "-c", "pass"]
    commands = {"(bare python)": bare} | {
        name: [sys.executable, "-m", "lightning_hub", *words] for name, words in verbs.items()
    }
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for _, name in alternated(list(commands), rounds):
        costs[name].append(whole(commands[name], environment))
    figures: dict[str, Json] = {}
    rows = []
    for name, found in costs.items():
        loaded = _loaded(verbs[name], environment) if name in verbs else []
        wall, cpu = middle([cost.wall for cost in found]), middle([cost.cpu for cost in found])
        figures[name] = {"wall": round(wall, 3), "cpu": round(cpu, 3), "heavy": list(loaded)}
        rows.append((name, f"{wall:.3f}", f"{cpu:.3f}", ", ".join(loaded) or "none"))
    print(f"whole process, median of {rounds}; runs list reads {runs} runs")
    table(("command", "wall s", "CPU s", "heavy modules"), rows)
    return figures


def _loaded(words: list[str], environment: dict[str, str]) -> list[str]:
    command = [sys.executable, "-c", WHICH_HEAVY, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stdout)
    return found


def first_steps(rounds: int, scratch: Path) -> dict[str, Json]:
    """Measure ``fit`` with and without a cache of prepared data, and the raw script."""
    from lightning_hub.models.pretrained import EMBEDDED_FOLDER  # 4 s: torch, which the light verbs are told apart from

    rows, out, warm = scratch / "rows.jsonl", scratch / "clock.json", scratch / "cache"
    rows.write_text("".join(json.dumps(row) + "\n" for row in conversations((SHOUT,), ROWS, seed=7)))
    to_first_step(
        _fit(rows, scratch / "warm", out), out, child_environment(**ONE_THREAD, LIGHTNING_HUB_CACHE=str(warm))
    )
    costs: dict[str, list[Cost]] = {name: [] for name in ("raw", "fit", "fit, data cached")}
    for number, name in alternated(list(costs), rounds):
        cache = warm if "cached" in name else scratch / f"cache-{number}"
        command = [sys.executable, str(RAW), str(EMBEDDED_FOLDER), str(rows), str(out)]
        if name != "raw":
            command = _fit(rows, scratch / f"{name}-{number}", out)
        environment = child_environment(**ONE_THREAD, LIGHTNING_HUB_CACHE=str(cache))
        costs[name].append(to_first_step(command, out, environment))
    figures: dict[str, Json] = {}
    lines = []
    for name, found in costs.items():
        wall, cpu = middle([cost.wall for cost in found]), middle([cost.cpu for cost in found])
        ratio = middle([one.cpu / other.cpu for one, other in zip(found, costs["raw"], strict=True)])
        figures[name] = {"wall": round(wall, 2), "cpu": round(cpu, 2), "ratio_to_raw": round(ratio, 3)}
        lines.append((name, f"{wall:.2f}", f"{cpu:.2f}", f"{ratio:.2f}"))
    print(f"\nspawn to the end of step 1 on the embedded model, {ROWS} chats, median of {rounds}, one thread")
    table(("process", "wall s", "CPU s", "CPU ratio"), lines)
    return figures


def _fit(rows: Path, run_dir: Path, out: Path) -> list[str]:
    clock = [{"class_path": "benchmarks.clock.Clock", "init_args": {"path": str(out)}}]
    # fmt: off
    return [
        sys.executable, "-m", "lightning_hub", "fit", "--allow-class", "benchmarks",
        "--trainer.accelerator", "cpu", "--trainer.max_steps", "1", "--trainer.gradient_clip_val", "1.0",
        "--trainer.callbacks", json.dumps(clock), "--model", "SFT", "--model.model", "demo",
        "--data", "ChatData", "--data.train", str(rows), "--data.max_seq_len", "256",
        "--data.max_tokens_per_gpu", "2048", "--data.tokens_per_step", "2048", "--run-dir", str(run_dir),
    ]
    # fmt: on


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=200)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        verbs = light_verbs(given.rounds, given.runs, Path(scratch))
        steps = first_steps(given.rounds, Path(scratch))
    record("startup", {"rounds": given.rounds, "runs": given.runs, "verbs": verbs, "first_step": steps})


if __name__ == "__main__":
    main()
