"""What OSFT costs beside SFT: CPU time of a step on the same rows, and the state of a model of 8 billion parameters.

Contenders take turns in one process with one thread: a few steps each, in alternated rounds, compared by the median of
their CPU times. The state is computed from shapes, without memory: weights, gradients, and AdamW's two moments.

usage: python -m benchmarks.osft_cost [--rounds 5] [--steps 6] [--tokens 4096]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from benchmarks.records import ONE_THREAD, alternated, record, table
from benchmarks.strategy_memory import MODELS
from benchmarks.work import SHAPES, chat_lengths, make_model, make_rows
from lightning_hub.data.datamodule import ChatData
from lightning_hub.methods.causal_lm import CausalLMModule
from lightning_hub.methods.osft import OSFT
from lightning_hub.methods.osft.inject import DeltaConfig, inject_deltas
from lightning_hub.methods.sft import SFT
from lightning_hub.methods.targets import resolve_targets
from lightning_hub.runs.files import Json

RATIO = 0.25
CONTENDERS: dict[str, Callable[[str], CausalLMModule]] = {
    "sft": lambda model: SFT(model, learning_rate=1e-5),
    "osft full": lambda model: OSFT(model, RATIO, learning_rate=1e-5),
    "osft full, factored": lambda model: OSFT(model, RATIO, forward="factored", learning_rate=1e-5),
    "osft thin": lambda model: OSFT(model, RATIO, complement="thin", learning_rate=1e-5),
    "osft usv": lambda model: OSFT(model, RATIO, parametrization="usv", learning_rate=1e-5),
}

FORMS = {
    "full": DeltaConfig(RATIO),
    "thin": DeltaConfig(RATIO, "thin"),
    "usv": DeltaConfig(RATIO, parametrization="usv"),
}


class Clock(Callback):
    """Notes the CPU time at the end of every step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        """Note it."""
        self.times.append(time.process_time())


def step_ms(make: Callable[[str], CausalLMModule], work: Path, steps: int, tokens: int) -> list[float]:
    """Return the CPU time of each step but the first two, in milliseconds."""
    clock = Clock()
    data = ChatData(str(work / "rows.jsonl"), max_seq_len=tokens, tokens_per_step=tokens)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=steps + 2, gradient_clip_val=1.0, logger=False, callbacks=[clock],
        use_distributed_sampler=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(make(str(work / "model")), data)
    return [1e3 * (end - start) for start, end in zip(clock.times[1:], clock.times[2:], strict=False)]


def state_gb(model: PreTrainedModel) -> tuple[float, float]:
    """Return the state of a model in GB: of all of it, and without embeddings and output layer."""
    ends = {id(parameter) for part in ("embed_tokens", "lm_head") for parameter in _of(model, part)}

    def total(skipped: set[int]) -> float:
        kept = [parameter for parameter in model.parameters() if id(parameter) not in skipped]
        return sum(one.nbytes * (4 if one.requires_grad else 1) for one in kept) / 1e9

    return total(set()), total(ends)


def _of(model: PreTrainedModel, part: str) -> Iterator[torch.nn.Parameter]:
    return (parameter for name, parameter in model.named_parameters() if part in name)


def with_changes(config: PretrainedConfig, form: DeltaConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Return a model with changes under its layers, without memory."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False)
    inject_deltas(model, resolve_targets(model, "all-linear"), form)
    return model


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=4096)
    given = parser.parse_args()
    os.environ.update(ONE_THREAD)
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as scratch:
        work, shape = Path(scratch), SHAPES["small"]
        os.environ["LIGHTNING_HUB_CACHE"] = str(work / "cache")
        make_model(work / "model", shape)
        count = 2 * (given.steps + 2) * given.tokens // 200
        make_rows(work / "rows.jsonl", chat_lengths(count, 200, given.tokens, 0), shape.vocab_size)
        for number, name in alternated(tuple(CONTENDERS), given.rounds):
            times = step_ms(CONTENDERS[name], work, given.steps, given.tokens)
            found[name].append(statistics.median(times))
            print(f"  round {number + 1} {name}: {found[name][-1]:.0f} CPU ms a step", flush=True)
    ratios = {
        name: statistics.median(a / b for a, b in zip(times, found["sft"], strict=True))
        for name, times in found.items()
    }
    state = {name: state_gb(with_changes(MODELS["Llama-3.1-8B"], form)) for name, form in FORMS.items()}
    table(
        ("contender", "CPU ms", "to SFT"),
        [(n, round(statistics.median(t)), round(ratios[n], 3)) for n, t in found.items()],
    )
    table(("state of 8B, GB", "all", "decoder layers"), [(n, round(a, 1), round(b, 1)) for n, (a, b) in state.items()])
    figures: dict[str, Json] = {
        "rounds": given.rounds, "steps": given.steps, "tokens": given.tokens, "ratio": RATIO,
        "cpu_ms": {name: round(statistics.median(times), 1) for name, times in found.items()},
        "to_sft": {name: round(ratio, 4) for name, ratio in ratios.items()},
        "state_gb": {name: [round(one, 2) for one in pair] for name, pair in state.items()},
    }  # fmt: skip
    record("osft_cost", figures)


if __name__ == "__main__":
    main()
