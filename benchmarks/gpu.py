"""Training on one device: the demo, exactness of the kernels, then SFT of a 0.5 B model with random weights.

Each part runs in processes of its own with a time limit, so that a failure costs one row of the result. The model is
that of Qwen2.5-0.5B in its sizes and trains in bf16-mixed through the command line: tokens per second, share of the
device's peak, peak memory; a resumed run against a straight one, both with deterministic kernels; the export against
the checkpoint. Without a CUDA device a tiny shape runs on the CPU, which measures no GPU and says so.

usage: python -m benchmarks.gpu [--tokens 16384] [--steps 20] [--parts exactness demo sft]
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
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.framework_cost import largest_difference
from benchmarks.records import QUIET, child_environment, middle, record, table
from benchmarks.work import SHAPES, Shape, chat_lengths, make_model, make_rows
from lightning_hub.runs.files import Json
from lightning_hub.runs.folder import RunFolder, list_runs
from lightning_hub.runs.metrics import as_number, read_metrics

LIMIT = 240
"""Seconds that one process may take."""

WARM_UP = 5
RESUME_STEPS = 6

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bfloat16 operations per second by the data sheet, by a part of the device's name."""


@dataclass(frozen=True)
class Plan:
    """What is trained: a shape, tokens of a step (which is one row), documents of a mean length, steps."""

    device: str
    shape: Shape
    tokens: int
    mean: int
    longest: int
    steps: int
    scratch: Path


def command_line(*words: str, deterministic: bool = False) -> None:
    """Run ``lightning-hub`` with these words.

    Raises:
        RuntimeError: It failed; the end of its output stands in the message.
        subprocess.TimeoutExpired: It took longer than allowed.
    """
    more = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if deterministic else {}
    command = [sys.executable, "-m", "lightning_hub", *words]
    done = subprocess.run(command, env=child_environment(**QUIET, **more), capture_output=True, text=True,
                          timeout=LIMIT, check=False)  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{words[0]} ended with {done.returncode}: {done.stdout[-500:]} {done.stderr[-1500:]}")


def exactness(plan: Plan) -> dict[str, Json]:
    """Compare packed attention and the loss head with their references on this device."""
    command = [sys.executable, "-m", "benchmarks.exactness", "--json", "--device", plan.device]
    done = subprocess.run(command, env=child_environment(**QUIET), capture_output=True, text=True, timeout=LIMIT,
                          check=False)  # fmt: skip
    if not done.stdout.startswith("["):
        raise RuntimeError(done.stderr[-1500:])
    checks: list[dict[str, Json]] = json.loads(done.stdout)
    rows = [(c["what"], c["dtype"], f"{c['error']:.1e}", f"{c['allowed']:.1e}", c["ok"]) for c in checks]
    table(("check", "precision", "error", "allowed", "ok"), rows)
    return {"all_ok": all(bool(check["ok"]) for check in checks), "checks": [dict(check) for check in checks]}


def demo(plan: Plan) -> dict[str, Json]:
    """Run the demo as a person does."""
    began = time.perf_counter()
    command_line("demo", "--runs-root", str(plan.scratch / "demo"))
    seconds = time.perf_counter() - began
    losses = series(list_runs(plan.scratch / "demo")[0], "val_loss")
    print(f"demo: {seconds:.0f} s, validation loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return {"seconds": round(seconds, 1), "val_loss_before": losses[0], "val_loss_after": losses[-1]}


def series(run: RunFolder, name: str) -> list[float]:
    """Return the values of a metric, in the order of steps."""
    values = (as_number(line[name]) for line in read_metrics(run) if name in line)
    return [value for value in values if value is not None]


def sft(plan: Plan) -> dict[str, Json]:
    """Train the model, measure it, and check resume and export."""
    make_model(plan.scratch / "model", plan.shape, device=plan.device)
    count = 2 * plan.steps * plan.tokens // plan.mean
    lengths = chat_lengths(count, plan.mean, plan.longest, seed=0)
    make_rows(plan.scratch / "rows.jsonl", lengths, plan.shape.vocab_size)
    straight = fit(plan, "straight", plan.steps)
    figures = speed(plan, straight, float((lengths**2).sum() / lengths.sum()))
    figures |= exported(plan, straight)
    return figures | resumed(plan)


def fit(plan: Plan, name: str, steps: int, *more: str, deterministic: bool = False) -> RunFolder:
    """Train through the command line and return the run."""
    folder = RunFolder(plan.scratch / name)
    # fmt: off
    command_line(
        "fit", "--run-dir", str(folder.path), *more, "--trainer.accelerator", plan.device,
        "--trainer.max_steps", str(steps), "--trainer.precision", "bf16-mixed", "--trainer.log_every_n_steps", "1",
        "--trainer.gradient_clip_val", "1.0", "--model", "SFT", "--model.model", str(plan.scratch / "model"),
        "--model.lr_scheduler", "constant", "--data", "ChatData", "--data.train", str(plan.scratch / "rows.jsonl"),
        "--data.max_seq_len", str(plan.longest), "--data.max_tokens_per_gpu", str(plan.tokens),
        "--data.tokens_per_step", str(plan.tokens),
        deterministic=deterministic,
    )
    # fmt: on
    return folder


def speed(plan: Plan, run: RunFolder, mean_square: float) -> dict[str, Json]:
    """Return medians over the steps after warm-up.

    Args:
        plan: What was trained.
        run: How it went.
        mean_square: Sum of the squares of the documents' lengths over the sum of the lengths.
    """
    seconds = middle(series(run, "step_time")[WARM_UP:])
    rate = middle(series(run, "tokens_per_second")[WARM_UP:])
    tokens, trained = series(run, "tokens")[-1] / plan.steps, series(run, "loss_tokens")[-1] / plan.steps
    operations = flops(plan.shape, tokens, trained, tokens * mean_square)
    peak = next((value for name, value in PEAKS.items() if name in device_name(plan.device)), None)
    memory = series(run, "memory_gb")
    figures: dict[str, Json] = {
        "tokens_a_step": round(tokens),
        "step_seconds": round(seconds, 4),
        "tokens_per_second": round(rate),
        "model_tflops": round(operations / seconds / 1e12, 2),
        "mfu": round(operations / seconds / peak, 4) if peak else None,
        "peak_memory_gb": round(max(memory), 2) if memory else None,
        "loss_first": series(run, "loss")[0],
        "loss_last": series(run, "loss")[-1],
    }
    table(("sft, bf16-mixed", ""), list(figures.items()))
    return figures


def flops(shape: Shape, tokens: float, trained: float, squares: float) -> float:
    """Return the operations of a step: forward and twice that backward, the head on trained tokens only.

    Args:
        shape: The model.
        tokens: Tokens of a step.
        trained: Trained tokens of a step.
        squares: Sum of the squares of the documents' lengths: causal attention costs half of each.
    """
    width, kv = shape.hidden_size, shape.hidden_size * shape.num_key_value_heads // shape.num_attention_heads
    layer = 2 * width * width + 2 * width * kv + 3 * width * shape.intermediate_size
    forward = 2 * shape.num_hidden_layers * layer * tokens + 2 * shape.vocab_size * width * trained
    return 3 * (forward + 2 * shape.num_hidden_layers * width * squares)


def exported(plan: Plan, run: RunFolder) -> dict[str, Json]:
    """Load the export with transformers and compare it with the newest checkpoint, weights and logits."""
    model = AutoModelForCausalLM.from_pretrained(run.export, dtype="auto")
    other = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    weights = load_file(run.latest / "weights.safetensors")
    other.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})
    ids = torch.arange(3, 67, device=plan.device).unsqueeze(0)
    for loaded in (model, other):
        nn.Module.to(loaded, plan.device)
        loaded.eval()
    with torch.no_grad():
        same = torch.equal(model(ids).logits, other(ids).logits)
    print(
        f"export: {str(model.dtype).removeprefix('torch.')}, logits {'equal' if same else 'NOT EQUAL'} to the module's"
    )
    return {"export_equal": same}


def resumed(plan: Plan) -> dict[str, Json]:
    """Resume in the middle and compare losses and weights with those of the straight run."""
    half = RESUME_STEPS // 2
    options = ("--trainer.deterministic", "warn", "--checkpoint.every_n_steps", str(half))
    straight = fit(plan, "whole", RESUME_STEPS, *options, deterministic=True)
    source = str(straight.checkpoint(half).absolute())
    second = fit(plan, "resumed", RESUME_STEPS, *options, "--resume", source, deterministic=True)
    expected, found = (series(run, "loss")[-half:] for run in (straight, second))
    weights = [load_file(run.checkpoint(RESUME_STEPS) / "weights.safetensors") for run in (straight, second)]
    same = all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    worst = largest_difference(found, expected)
    print(f"resume: losses differ by {worst:.1e}, relative; weights {'bit-equal' if same else 'NOT BIT-EQUAL'}")
    return {"resume_loss_difference": worst, "resume_weights_equal": same}


PARTS: dict[str, Callable[[Plan], dict[str, Json]]] = {"exactness": exactness, "demo": demo, "sft": sft}


def run_parts(plan: Plan, names: Sequence[str]) -> dict[str, Json]:
    """Run parts one after another; one that fails is told and does not stop the others."""
    results: dict[str, Json] = {}
    for name in names:
        print(f"\n== {name}", flush=True)
        began = time.perf_counter()
        try:
            found = PARTS[name](plan)
        except Exception as error:  # whatever breaks on a device nobody has tried: told in the result
            found = {"error": f"{type(error).__name__}: {str(error)[-2000:]}"}
            print(f"FAILED: {found['error']}")
        results[name] = found | {"wall_seconds": round(time.perf_counter() - began, 1)}
    return results


def device_name(device: str) -> str:
    """Return the name of the accelerator; empty on a CPU."""
    return torch.cuda.get_device_name() if device == "cuda" else ""


def main() -> int:
    """Run the parts that were asked for; the exit status tells whether any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of a step on a GPU")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    given = parser.parse_args()
    measured = given.device == "cuda"
    print(
        f"device: {device_name(given.device)}"
        if measured
        else "no CUDA device: a tiny shape on the CPU, NO GPU WAS MEASURED"
    )
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["LIGHTNING_HUB_CACHE"] = str(Path(scratch, "cache"))
        plan = Plan("cpu", SHAPES["tiny-qwen"], 512, 60, 256, given.steps, Path(scratch))
        if measured:
            plan = Plan("cuda", SHAPES["0.5b"], given.tokens, 600, 4096, given.steps, Path(scratch))
        results = run_parts(plan, given.parts)
    values: dict[str, Json] = {"gpu_measured": measured, "parts": results}
    record("gpu", values, device_name(given.device) or None)
    failed = [name for name, result in results.items() if isinstance(result, dict) and "error" in result]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
