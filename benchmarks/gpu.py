"""Training on one device, in parts that each end within four minutes on a machine with this repository and its wheels.

Every part trains a model with random weights through the command line, beside a bare loop over the same rows in a
process of its own (``benchmarks.gpu_raw``): tokens per second, MFU, peak memory, time to the first step, time from the
last step to the exit, and where the run's time went by phase. A part that fails costs one entry of the result. Without
a CUDA device a tiny shape runs on the CPU, which measures no GPU and says so.

usage: python -m benchmarks.gpu [--steps 14] [--parts exactness demo sft-0.5b lora-7b sft-1.5b osft-1.5b nf4 fsdp1]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu_work import LIMIT, Plan, command_line, exported, resumed, series, trained_beside_raw
from benchmarks.records import QUIET, child_environment, record, table
from lightning_hub.runs.files import Json
from lightning_hub.runs.folder import list_runs

Figures = dict[str, Json]


def exactness(plan: Plan) -> Figures:
    """Compare packed attention and the loss head with their references on this device."""
    command = [sys.executable, "-m", "benchmarks.exactness", "--json", "--device", plan.device]
    done = subprocess.run(command, env=child_environment(**QUIET), capture_output=True, text=True, timeout=LIMIT,
                          check=False)  # fmt: skip
    if not done.stdout.startswith("["):
        raise RuntimeError(done.stderr[-1500:])
    checks: list[Figures] = json.loads(done.stdout)
    rows = [(c["what"], c["dtype"], f"{c['error']:.1e}", f"{c['allowed']:.1e}", c["ok"]) for c in checks]
    table(("check", "precision", "error", "allowed", "ok"), rows)
    return {"all_ok": all(bool(check["ok"]) for check in checks), "checks": [dict(check) for check in checks]}


def demo(plan: Plan) -> Figures:
    """Run the demo as a person does."""
    began = time.perf_counter()
    command_line("demo", "--runs-root", str(plan.scratch / "demo"))
    seconds = time.perf_counter() - began
    losses = series(list_runs(plan.scratch / "demo")[0], "val_loss")
    print(f"demo: {seconds:.0f} s, validation loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return {"seconds": round(seconds, 1), "val_loss_before": losses[0], "val_loss_after": losses[-1]}


def sft_small(plan: Plan) -> Figures:
    """Train in bf16-mixed; compare the export with the checkpoint, and a resumed run with a straight one."""
    mixed = replace(plan, precision="bf16-mixed")
    run, figures = trained_beside_raw(mixed, "sft", ("--model", "SFT"))
    return figures | exported(mixed, run) | resumed(mixed)


def sft(plan: Plan, more: tuple[str, ...] = ()) -> Figures:
    """Train every weight in bf16-true."""
    return trained_beside_raw(plan, "sft", ("--model", "SFT", *more))[1]


def osft(plan: Plan) -> Figures:
    """Train with OSFT; the raw loop is that of full training, which has no such thing."""
    return trained_beside_raw(plan, "sft", ("--model", "OSFT", "--model.unfreeze_rank_ratio", "0.25"))[1]


def lora(plan: Plan, kind: str = "lora", more: tuple[str, ...] = ()) -> Figures:
    """Train adapters; the raw loop has peft's own, in bfloat16."""
    flags = ("--model", "LoRA", "--model.r", "16", "--model.alpha", "32", *more)
    return trained_beside_raw(plan, kind, flags)[1]


SHAPES_OF_PARTS = {"sft-0.5b": "0.5b", "sft-1.5b": "1.5b", "osft-1.5b": "1.5b", "fsdp1": "1.5b", "lora-7b": "7b",
                   "nf4": "1.5b"}  # fmt: skip
TOKENS_OF_PARTS = {"lora-7b": 8192}
PARTS: dict[str, Callable[[Plan], Figures]] = {
    "exactness": exactness,
    "demo": demo,
    "sft-0.5b": sft_small,
    "lora-7b": lora,
    "sft-1.5b": sft,
    "osft-1.5b": osft,
    "nf4": partial(lora, kind="nf4", more=("--model.quantization", "nf4")),
    "fsdp1": partial(sft, more=("--trainer.strategy", "fsdp", "--trainer.devices", "1")),
}


def run_parts(plan: Plan, names: Sequence[str], *, measured: bool) -> Figures:
    """Run parts one after another; one that fails is told and does not stop the others."""
    results: Figures = {}
    for name in names:
        print(f"\n== {name}", flush=True)
        began = time.perf_counter()
        mine = replace(plan, name=name)
        if measured and name in SHAPES_OF_PARTS:
            mine = replace(mine, shape=SHAPES_OF_PARTS[name], tokens=TOKENS_OF_PARTS.get(name, plan.tokens))
        try:
            found = PARTS[name](mine)
        except Exception as error:  # whatever breaks on a device nobody has tried: told in the result
            found = {"error": f"{type(error).__name__}: {str(error)[-2000:]}"}
            print(f"FAILED: {found['error']}")
        results[name] = found | {"wall_seconds": round(time.perf_counter() - began, 1)}
        record(
            "gpu", {"gpu_measured": measured, "part": name, **found}, torch.cuda.get_device_name() if measured else None
        )
    return results


def main() -> int:
    """Run the parts that were asked for; the exit status tells whether any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of a step on a GPU, of parts not of 7b")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    given = parser.parse_args()
    measured = given.device == "cuda"
    name = torch.cuda.get_device_name() if measured else ""
    print(f"device: {name}" if measured else "no CUDA device: a tiny shape on the CPU, NO GPU WAS MEASURED")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["LIGHTNING_HUB_CACHE"] = str(Path(scratch, "cache"))
        plan = Plan("", "cpu", "tiny-qwen", 512, 60, 256, given.steps, Path(scratch))
        if measured:
            plan = Plan("", "cuda", "0.5b", given.tokens, 600, 4096, given.steps, Path(scratch))
        results = run_parts(plan, given.parts, measured=measured)
    failed = [name for name, result in results.items() if isinstance(result, dict) and "error" in result]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
