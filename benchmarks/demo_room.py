"""The second embedded model, which ``lightning-hub demo --method`` teaches, and what the methods keep of it.

It is a small Llama with room, made as the models of ``benchmarks.room`` are: an optimizer that scales each matrix as a
whole, weight decay, and orthonormal embeddings that stay as they are. The random numbers that fill the matrices at the
start are taken out again while it learns, so that fewer steps leave nothing of them.

``python -m benchmarks.demo_room`` lets it learn the facts of each of five seeds, in an order of that seed, with the
demo's recipes, and tells what is kept and what is learnt. With ``--new-models`` the model is made anew for each seed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from benchmarks.records import ONE_THREAD, record, table
from benchmarks.room import WholeMatrix
from lightning_hub.cli import run
from lightning_hub.data.sample_store import SampleStore
from lightning_hub.data.step_plan import BatchSettings, StepPlan
from lightning_hub.demo.methods import known_and_new, method_flags, write_facts
from lightning_hub.demo.tasks import METHODS, turned_words
from lightning_hub.models.pretrained import EMBEDDED_FOLDER, ROOM_FOLDER, Pretrained
from lightning_hub.ops.attention import PACKED
from lightning_hub.ops.attention_proof import proven_loss
from lightning_hub.ops.batch import IGNORE_INDEX
from lightning_hub.runs.files import Json

WIDTH, BATCH, STEPS, RATE, DECAY = 128, 32, 450, 3e-3, 1.5

USED = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
"""The letters of both tasks; they and the special tokens get orthonormal embeddings."""


def fresh(seed: int, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Return the model untrained."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(PACKED)
    special = sorted(tokenizer.all_special_ids)
    first = [*special, *tokenizer(USED, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight
        orthonormal = torch.nn.init.orthogonal_(torch.empty(WIDTH, WIDTH))
        embeddings.copy_(normalize(torch.randn(len(embeddings), WIDTH), dim=-1))
        embeddings[first] = orthonormal[: len(first)]
    return model


def lesson(seed: int, steps: int, tokenizer: PreTrainedTokenizerBase) -> StepPlan:
    """Return the steps that teach it to turn words round."""
    pairs = []
    for row in turned_words(steps * BATCH, seed + 100):
        question, answer = row["messages"]
        asked = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=False)
        said = [*tokenizer(answer["content"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        pairs.append(([*asked, *said], [IGNORE_INDEX] * len(asked) + said))
    return StepPlan(SampleStore.from_pairs(pairs), BatchSettings(512, BATCH, None, shuffle=True, seed=seed))


def trained(seed: int, steps: int = STEPS) -> LlamaForCausalLM:
    """Return the model when it knows its task."""
    tokenizer = Pretrained("demo").tokenizer
    model = fresh(seed, tokenizer)
    model.model.embed_tokens.requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    filling = [parameter.detach().clone() for parameter in parameters if parameter.ndim == 2]
    optimizer = WholeMatrix(parameters, RATE, DECAY)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps)))
    head, plan = proven_loss(model), lesson(seed, steps, tokenizer)
    for index in range(steps):
        step = plan.step(0, index)
        optimizer.zero_grad()
        for row in step.rows:
            (head(row) / step.num_trained).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
        _fade(parameters, filling, rate, index, range(3 * steps // 10, 6 * steps // 10))
    return model.requires_grad_(False)


@torch.no_grad()
def _fade(parameters: Sequence[Tensor], filling: Sequence[Tensor], rate: float, index: int, steps: range) -> None:
    """Take a part of what is left of the random filling out of the matrices, so that after the steps none is left."""
    for matrix, left in zip((one for one in parameters if one.ndim == 2), filling, strict=True):
        left.mul_(1 - rate * DECAY)
        if index in steps:
            part = left / (steps.stop - index)
            matrix.sub_(part)
            left.sub_(part)


def make(folder: Path, seed: int, steps: int = STEPS) -> None:
    """Write the model of a seed, in bfloat16, with its tokenizer beside it."""
    model = trained(seed, steps)
    model.set_attn_implementation("sdpa")
    torch.nn.Module.to(model, torch.bfloat16)  # its own `to` is typed as no method
    model.save_pretrained(folder)
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED_FOLDER / name, folder)


COLUMNS = ("knew before", "new before", "knew after", "new after")


def measure(
    method: str, seed: int, base: Path, scratch: Path, more: Sequence[str] = ()
) -> tuple[dict[str, float], float]:
    """Let the model of a seed learn the facts of that seed; return what it knows before and after, and CPU seconds."""
    data = scratch / "facts"
    data.mkdir(exist_ok=True)
    start = time.process_time()
    flags = method_flags(method, *write_facts(data, seed), str(base))
    made = scratch / method
    if run(["fit", "--run-dir", str(made), *flags, "--seed_everything", str(seed), *more]):
        raise RuntimeError(f"{method}, seed {seed}: the run has failed")
    shares = (*known_and_new(str(base), seed), *known_and_new(str(made / "export"), seed))
    return dict(zip(COLUMNS, shares, strict=True)), round(time.process_time() - start, 1)


def main() -> None:
    """Measure all methods on all seeds, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(5)))
    parser.add_argument("--only", choices=METHODS, nargs="*", default=METHODS)
    parser.add_argument("--new-models", action="store_true", help="make a model for each seed, too")
    parser.add_argument("--quick", action="store_true", help="one seed and a few steps, to see that it runs; no record")
    given = parser.parse_args()
    os.environ.update(ONE_THREAD)
    torch.set_num_threads(1)
    found: list[Json] = []
    rows: list[tuple[str, ...]] = []
    for seed in given.seeds[:1] if given.quick else given.seeds:
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder, "base") if given.new_models else ROOM_FOLDER
            if given.new_models:
                make(base, seed, 5 if given.quick else STEPS)
            for method in given.only:
                more = ["--trainer.max_steps", "3"] if given.quick else []
                shares, cpu_seconds = measure(method, seed, base, Path(folder), more)
                found.append({"seed": seed, "method": method, "cpu_seconds": cpu_seconds, **dict(shares)})
                print(json.dumps(found[-1]), flush=True)
                rows.append((str(seed), method, *(f"{value:.0%}".replace("%", " %") for value in shares.values())))
    table(("seed", "method", *COLUMNS), rows)
    if not given.quick:
        record("demo_room", {"new_models": given.new_models, "runs": found})


if __name__ == "__main__":
    main()
