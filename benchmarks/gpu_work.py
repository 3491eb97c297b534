"""The work of the parts of ``benchmarks.gpu``: a training through the command line, a bare loop, and checks."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.framework_cost import largest_difference
from benchmarks.records import QUIET, child_environment, middle, table
from benchmarks.work import SHAPES, chat_lengths, make_model, make_rows
from lightning_hub.runs.files import Json
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.metrics import as_number, read_metrics

LIMIT = 240
"""Seconds that one process may take."""

WARM_UP = 4
RESUME_STEPS = 6


@dataclass(frozen=True)
class Plan:
    """What a part trains.

    Attributes:
        name: The part.
        device: cuda or cpu.
        shape: Name of the model's shape.
        tokens: Tokens of a step, which is one packed row.
        mean: Mean length of a document.
        longest: The longest document.
        steps: Optimizer steps.
        scratch: Where everything is written.
        precision: The trainer's.
    """

    name: str
    device: str
    shape: str
    tokens: int
    mean: int
    longest: int
    steps: int
    scratch: Path
    precision: str = "bf16-true"

    @property
    def work(self) -> Path:
        """The folder of the model and the rows; parts of the same shape share it."""
        return self.scratch / self.shape

    def prepare(self) -> None:
        """Make the model and the rows, in a process of its own: a device's memory is free again when it ends."""
        if self.work.is_dir():
            return
        shape = SHAPES[self.shape]
        made = multiprocessing.get_context("spawn").Process(
            target=make_model, args=(self.work / "model", shape, 0, self.device)
        )
        made.start()
        made.join()
        if made.exitcode:
            raise RuntimeError(f"the model could not be made: exit code {made.exitcode}")
        count = 2 * self.steps * self.tokens // self.mean
        make_rows(self.work / "rows.jsonl", chat_lengths(count, self.mean, self.longest, seed=0), shape.vocab_size)


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


def series(run: RunFolder, name: str) -> list[float]:
    """Return the values of a metric, in the order of steps."""
    values = (as_number(line[name]) for line in read_metrics(run) if name in line)
    return [value for value in values if value is not None]


def fit(plan: Plan, name: str, steps: int, *more: str, deterministic: bool = False) -> RunFolder:
    """Train through the command line and return the run."""
    folder = RunFolder(plan.scratch / f"{plan.name}-{name}")
    # fmt: off
    command_line(
        "fit", "--run-dir", str(folder.path), *more, "--trainer.accelerator", plan.device,
        "--trainer.max_steps", str(steps), "--trainer.precision", plan.precision, "--trainer.log_every_n_steps", "1",
        "--trainer.gradient_clip_val", "1.0", "--model.model", str(plan.work / "model"),
        "--model.lr_scheduler", "constant", "--model.learning_rate", "1e-5",
        "--data", "ChatData", "--data.train", str(plan.work / "rows.jsonl"),
        "--data.max_seq_len", str(plan.longest), "--data.max_tokens_per_gpu", str(plan.tokens),
        "--data.tokens_per_step", str(plan.tokens),
        deterministic=deterministic,
    )
    # fmt: on
    return folder


def trained_beside_raw(plan: Plan, kind: str, flags: tuple[str, ...]) -> tuple[RunFolder, dict[str, Json]]:
    """Train with ``fit`` and with the bare loop; return the run and the figures of both.

    Args:
        plan: What is trained.
        kind: The bare loop: sft, lora or nf4.
        flags: The method and its options, for ``fit``.
    """
    plan.prepare()
    began = time.time()
    run = fit(plan, "run", plan.steps, *flags)
    ended = time.time()
    figures = speed(run) | {
        "first_step_seconds": round(_times(run)[0] - began, 2),
        "after_last_step_seconds": round(ended - _times(run)[-1], 2),
        "phases": phases(run),
    }
    raw = bare_loop(plan, kind)
    figures |= {f"raw_{name}": value for name, value in raw.items()}
    figures["ratio_to_raw"] = round(float(str(figures["tokens_per_second"])) / float(str(raw["tokens_per_second"])), 4)
    rows = [(name, value) for name, value in figures.items() if name != "phases"]
    table((f"{plan.name}, {plan.precision}", ""), [*rows, *phases(run).items()])
    return run, figures


def bare_loop(plan: Plan, kind: str) -> dict[str, Json]:
    """Run the bare loop in a process of its own."""
    out = plan.scratch / f"raw-{kind}-{plan.shape}-{plan.precision}-{plan.tokens}-{plan.steps}.json"
    command = [sys.executable, "-m", "benchmarks.gpu_raw", "--kind", kind, "--work", str(plan.work), "--out", str(out)]
    command += ["--steps", str(plan.steps), "--tokens", str(plan.tokens), "--longest", str(plan.longest)]
    command += ["--device", plan.device, "--precision", plan.precision]
    if not out.exists():  # parts of the same work share it
        done = subprocess.run(command, env=child_environment(**QUIET), capture_output=True, text=True, timeout=LIMIT,
                              check=False)  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"the bare loop ended with {done.returncode}: {done.stderr[-1500:]}")
    notes: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    rates = [tokens / seconds for tokens, seconds in zip(notes["tokens"][1:], notes["step_seconds"], strict=True)]
    memory = notes["peak_memory_gb"]
    return {
        "tokens_per_second": round(middle(rates[WARM_UP - 1 :])),
        "peak_memory_gb": None if memory is None else round(memory, 2),
        "first_step_seconds": round(notes["first_step_seconds"], 2),
        "loss_first": notes["losses"][0],
        "loss_last": notes["losses"][-1],
    }


def speed(run: RunFolder) -> dict[str, Json]:
    """Return medians over the steps after warm-up."""
    memory, mfu = series(run, "memory_gb"), series(run, "mfu")
    return {
        "step_seconds": round(middle(series(run, "step_time")[WARM_UP:]), 4),
        "tokens_per_second": round(middle(series(run, "tokens_per_second")[WARM_UP:])),
        "mfu": round(middle(mfu[WARM_UP:]), 4) if mfu else None,
        "peak_memory_gb": round(max(memory[1:]), 2) if memory else None,
        "loss_first": series(run, "loss")[0],
        "loss_last": series(run, "loss")[-1],
    }


def phases(run: RunFolder) -> dict[str, Json]:
    """Return the seconds of each phase, as the run tells them."""
    lines = [json.loads(line) for line in run.events.read_text(encoding="utf-8").splitlines()]
    found: dict[str, Json] = next(line["seconds"] for line in reversed(lines) if line["event"] == "timings")
    return found


def _times(run: RunFolder) -> list[float]:
    """Return when each logged step ended, as seconds since the epoch."""
    return [datetime.fromisoformat(str(line["time"])).timestamp() for line in read_metrics(run) if "loss" in line]


def exported(plan: Plan, run: RunFolder) -> dict[str, Json]:
    """Load the export with transformers and compare it with the newest checkpoint, weights and logits."""
    model = AutoModelForCausalLM.from_pretrained(run.export, dtype="auto")
    other = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    weights = load_file(run.latest / "weights.safetensors")
    missing = other.load_state_dict({name.removeprefix("model."): one for name, one in weights.items()}, strict=False)
    other.tie_weights()
    tied = set(getattr(other, "_tied_weights_keys", None) or ())
    if missing.unexpected_keys or set(missing.missing_keys) - tied:
        raise RuntimeError(f"the checkpoint does not fill the export: {missing}")
    ids = torch.arange(3, 67, device=plan.device).unsqueeze(0)
    for loaded in (model, other):
        nn.Module.to(loaded, plan.device)
        loaded.eval()
    with torch.no_grad():
        same = torch.equal(model(ids).logits, other(ids).logits)
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"export: {dtype}, logits {'equal' if same else 'NOT EQUAL'} to those of the checkpoint")
    return {"export_equal": same}


def resumed(plan: Plan) -> dict[str, Json]:
    """Resume in the middle and compare losses and weights with those of the straight run."""
    half = RESUME_STEPS // 2
    options = ("--model", "SFT", "--trainer.deterministic", "warn", "--checkpoint.every_n_steps", str(half))
    straight = fit(plan, "whole", RESUME_STEPS, *options, deterministic=True)
    source = str(straight.checkpoint(half).absolute())
    second = fit(plan, "resumed", RESUME_STEPS, *options, "--resume", source, deterministic=True)
    expected, found = (series(run, "loss")[-half:] for run in (straight, second))
    weights = [load_file(run.checkpoint(RESUME_STEPS) / "weights.safetensors") for run in (straight, second)]
    same = all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    worst = largest_difference(found, expected)
    print(f"resume: losses differ by {worst:.1e}, relative; weights {'bit-equal' if same else 'NOT BIT-EQUAL'}")
    return {"resume_loss_difference": worst, "resume_weights_equal": same}
