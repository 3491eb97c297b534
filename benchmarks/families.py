"""Every family of causal language models that transformers brings: how its rows are run, and how right that is.

Each family is built small from its default configuration, with windows and chunks shorter than the documents and
weights at which a leak would show. It is trained for three steps by ``SFT`` and, beside it, by a plain loop over
transformers' own model: eager attention, one document a forward, float32 on the CPU. The table is
``docs/models.md``: ``python -m benchmarks.families --write`` renews it, names of families limit what is run.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from lightning_hub.errors import ConfigError
from lightning_hub.methods.sft import SFT
from lightning_hub.models.pretrained import Pretrained
from lightning_hub.ops.batch import IGNORE_INDEX, PackedSequence, StepBatch
from lightning_hub.ops.loss import accepted_by
from lightning_hub.ops.miniature import NoMiniatureError, build, shrink, small_config
from lightning_hub.ops.small_sizes import VOCABULARY

BEGIN, END = "<!-- begin of the table -->", "<!-- end of the table -->"

TRACEBACK = "TRACEBACK"

PAGE = Path(__file__).parent.parent / "docs" / "models.md"

DECODER = {"is_decoder": True}

QWEN4 = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}  # fmt: skip

OPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
         "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"),
        DECODER,
    ),
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
        }
    },
    "dbrx": {"attn_config": {"kv_n_heads": 8, "rope_theta": 1e4, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {**DECODER, "hash_seed": 1, "axial_pos_embds": False},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": {**DECODER, "default_language": "en_XX"},
}  # fmt: skip
"""What a family's default configuration lacks to be a causal language model, or a whole one of its kind."""

STEPS = 3
RATE = 1e-3
LENGTHS = (((11, 7), (5, 14, 9)), ((13,), (6, 8)), ((4, 12, 10), (9,)))
"""Tokens of the documents of each row of each step."""


@dataclass
class Outcome:
    """What came of a family.

    Attributes:
        family: Its name in transformers.
        way: ``packed``, ``one by one, sdpa``, ``refused`` and the like.
        reason: Why it is not packed.
        errors: By name the largest relative difference to plain transformers.
    """

    family: str
    way: str
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)


def steps() -> list[StepBatch]:
    """Return the steps of a training: documents of different lengths, about half of their tokens trained."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for rows in LENGTHS:
        packed = []
        for lengths in rows:
            pairs = []
            for length in lengths:
                ids = torch.randint(3, VOCABULARY - 8, (length,), generator=generator)
                labels = ids.where(torch.rand(length, generator=generator) < 0.5, IGNORE_INDEX)
                labels[-1] = ids[-1]
                pairs.append((ids, labels))
            packed.append(PackedSequence.pack(pairs))
        trained = sum(int((row.labels != IGNORE_INDEX).sum()) for row in packed)
        made.append(StepBatch(tuple(packed), trained, sum(row.num_tokens for row in packed)))
    return made


def save_family(family: str, folder: Path) -> None:
    """Write a small model of a family, as its checkpoints are: some hold more than the part that is opened.

    Raises:
        NoMiniatureError: It cannot be built small.
    """
    try:
        config = AutoConfig.for_model(family, **OPTIONS.get(family, {}))
        with torch.device("meta"):
            outline = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    except Exception as error:  # each family checks its configuration in its own way
        raise NoMiniatureError(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from error
    with torch.random.fork_rng(devices=[]):
        small = small_config(type(outline), outline.config)
        build(type(outline), small, "eager").save_pretrained(folder)
    if type(outline.config) is not type(config):
        try:
            whole = shrink(config, 2)
        except Exception:  # what is beside the text cannot be made small: the part that is opened is a model, too
            return
        whole.text_config = small
        whole.save_pretrained(folder)


class Watched(SFT):
    """Keeps what is compared."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.losses: list[float] = []
        self.gradients: dict[str, Tensor] = {}

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Note the loss of a step, and the gradients of the first."""
        super().configure_gradient_clipping(*args, **kwargs)
        self.losses.append(float(self.step_loss))
        if not self.gradients and self.model is not None:
            self.gradients = gradients(self.model)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a copy of each gradient, zeros where there is none."""
    named = model.named_parameters()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}


def plain_training(folder: Path, todo: Sequence[StepBatch]) -> tuple[PreTrainedModel, list[float], dict[str, Tensor]]:
    """Train transformers' own model: eager attention, one document a forward, one division for the step."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0)
    losses: list[float] = []
    first: dict[str, Tensor] = {}
    for step in todo:
        optimizer.zero_grad()
        total = 0.0
        for document in (document for row in step.rows for document in row.documents()):
            logits = model(input_ids=document.input_ids, **accepted_by(model, use_cache=False)).logits[0, :-1].float()
            loss = F.cross_entropy(logits, document.labels[0, 1:], reduction="sum", ignore_index=IGNORE_INDEX)
            (loss / step.num_trained).backward()
            total += float(loss) / step.num_trained
        first = first or gradients(model)
        losses.append(total)
        optimizer.step()
    return model, losses, first


def our_training(folder: Path, todo: Sequence[StepBatch], attention: str = "auto") -> Watched:
    """Train the same model by ``SFT``.

    Raises:
        ConfigError: It is refused.
    """
    module = Watched(model=str(folder), learning_rate=RATE, eps=1e-3, lr_scheduler="constant",
                     attn_implementation=attention)  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", max_steps=len(todo), logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(todo, batch_size=None))  # type: ignore[arg-type]  # a list is a data set
    return module


def logits_of(model: PreTrainedModel, todo: Iterable[StepBatch]) -> Tensor:
    """Return the logits of all documents, one a forward."""
    with torch.no_grad():
        documents = (document for step in todo for row in step.rows for document in row.documents())
        options = accepted_by(model, use_cache=False)
        return torch.cat([model(input_ids=document.input_ids, **options).logits[0].float() for document in documents])


def off(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Return the largest difference by the largest number."""
    return float((found - expected).abs().max() / (expected.abs().max() + floor).clamp_min(1e-30))


def outcome_of(family: str, attention: str = "auto") -> Outcome:
    """Build, train, export and read back a family."""
    with tempfile.TemporaryDirectory() as made:
        folder, target = Path(made) / "model", Path(made) / "export"
        try:
            save_family(family, folder)
        except NoMiniatureError as error:
            return Outcome(family, "not built", str(error))
        todo = steps()
        try:
            module = our_training(folder, todo, attention)
        except ConfigError as error:
            return Outcome(family, "refused", str(error))
        assert module.model is not None, "it is built by then"
        assert module.loss_head is not None, "it is built by then"
        plain, losses, first = plain_training(folder, todo)
        capabilities = module.loss_head.capabilities
        way = "packed" if capabilities.isolates_documents else f"one by one, {capabilities.attention}"
        largest = max(float(gradient.abs().max()) for gradient in first.values())
        errors = {
            "losses": max(abs(a - b) / b for a, b in zip(module.losses, losses, strict=True)),
            "gradients": max(off(module.gradients[name], first[name], 1e-2 * largest) for name in first),
        }
        module.export(target, Pretrained("demo").tokenizer)
        again = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, attn_implementation="eager").eval()
        weights = module.model.state_dict()
        same = [tensor.equal(weights[name]) for name, tensor in again.state_dict().items()]
        errors["export"] = 0.0 if all(same) else float("inf")
        errors["logits"] = off(logits_of(again, todo), logits_of(plain.eval(), todo))
        return Outcome(family, way, capabilities.reason, errors)


def outcomes(families: Iterable[str], attention: str = "auto") -> Iterator[Outcome]:
    """Yield what comes of each family; a traceback is an outcome too."""
    for family in families:
        try:
            yield outcome_of(family, attention)
        except Exception as error:
            yield Outcome(family, TRACEBACK, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def line_of(outcome: Outcome) -> str:
    """Return a line of the page's table."""
    errors = [f"{outcome.errors[name]:.0e}" if outcome.errors else "" for name in ("losses", "gradients", "logits")]
    export = "" if not outcome.errors else "equal" if outcome.errors["export"] == 0 else "differs"
    reason = re.sub(r"^model\.init_args\.model: ", "", outcome.reason).replace("|", "/")
    reason = re.sub(r"/\S+/model\b", "the folder", reason)
    return f"| `{outcome.family}` | {outcome.way} | {' | '.join(errors)} | {export} | {reason} |"


def write_page(found: Iterable[Outcome]) -> None:
    """Put lines into the table of the page; those of other families stay as they are."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    old, after = rest.split(END)
    lines = {match[1]: match[0] for match in re.finditer(r"^\| `([^`]+)` \|.*$", old, re.MULTILINE)}
    lines |= {outcome.family: line_of(outcome) for outcome in found}
    kept = [lines[family] for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if family in lines]
    ways = Counter(line.split("|")[2].strip() for line in kept)
    said = ", ".join(f"{count} {way}" for way, count in sorted(ways.items(), key=lambda item: (-item[1], item[0])))
    table = [
        f"<!-- torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__} -->",
        "",
        "| Family | Rows | Losses | Gradients | Logits | Export | Why |",
        "|---|---|---|---|---|---|---|",
        *kept,
        "",
        f"{len(kept)} families: {said}.",
        "",
    ]
    PAGE.write_text(f"{before}{BEGIN}\n{chr(10).join(table)}{END}{after}", encoding="utf-8")


def main() -> None:
    """Print an outcome a line, and write the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="names of families; all if none is given")
    parser.add_argument("--attention", default="auto", help="attn_implementation of SFT")
    parser.add_argument("--write", action="store_true", help="write the table of docs/models.md")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    found = []
    for outcome in outcomes(given.families or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, given.attention):
        found.append(outcome)
        errors = " ".join(f"{name} {error:.0e}" for name, error in outcome.errors.items())
        print(f"{outcome.family:24s} {outcome.way:18s} {errors:60s} {outcome.reason}", flush=True)
    if given.write:
        write_page(found)


if __name__ == "__main__":
    main()
