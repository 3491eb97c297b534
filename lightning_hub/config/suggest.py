"""Finds the right name for a wrong one: by spelling, by its name in other tools, or in another section."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

from lightning_hub.config.schema import ClassInfo, Schema

_CLOSE_ENOUGH = 0.7

SYNONYMS: dict[str, tuple[str, ...]] = {
    "lr": ("learning_rate",),
    "base_lr": ("learning_rate",),
    "epochs": ("max_epochs",),
    "num_epochs": ("max_epochs",),
    "num_train_epochs": ("max_epochs",),
    "steps": ("max_steps",),
    "gpus": ("devices",),
    "num_gpus": ("devices",),
    "nproc_per_node": ("devices",),
    "nnodes": ("num_nodes",),
    "max_grad_norm": ("gradient_clip_val",),
    "grad_clip": ("gradient_clip_val",),
    "clip_grad_norm": ("gradient_clip_val",),
    "logging_steps": ("log_every_n_steps",),
    "eval_steps": ("val_check_interval",),
    "save_steps": ("every_n_steps",),
    "save_total_limit": ("keep",),
    "save_top_k": ("keep",),
    "bf16": ("precision",),
    "fp16": ("precision",),
    "torch_dtype": ("dtype", "precision"),
    "mixed_precision": ("precision",),
    "batch_size": ("effective_batch_size",),
    "global_batch_size": ("effective_batch_size",),
    "per_device_train_batch_size": ("max_tokens_per_gpu", "effective_batch_size"),
    "micro_batch_size": ("max_tokens_per_gpu",),
    "gradient_accumulation_steps": ("effective_batch_size",),
    "max_batch_len": ("max_tokens_per_gpu",),
    "max_length": ("max_seq_len",),
    "max_seq_length": ("max_seq_len",),
    "model_max_length": ("max_seq_len",),
    "cutoff_len": ("max_seq_len",),
    "sequence_len": ("max_seq_len",),
    "model_name_or_path": ("model",),
    "model_path": ("model",),
    "model_name": ("model",),
    "data_path": ("train",),
    "dataset": ("train",),
    "train_file": ("train",),
    "train_data": ("train",),
    "eval_dataset": ("val",),
    "validation": ("val",),
    "lr_scheduler_type": ("lr_scheduler",),
    "scheduler": ("lr_scheduler",),
    "num_warmup_steps": ("warmup_steps",),
    "adam_epsilon": ("eps",),
    "adam_betas": ("betas",),
    "seed": ("seed_everything",),
    "lora_r": ("r",),
    "rank": ("r",),
    "lora_alpha": ("alpha",),
    "lora_dropout": ("dropout",),
    "target_modules": ("targets",),
    "flash_attention": ("attn_implementation",),
    "neftune_noise_alpha": ("neftune_alpha",),
    "label_smoothing_factor": ("label_smoothing",),
    "activation_checkpointing": ("gradient_checkpointing",),
    "wandb": ("WandbLogger",),
    "tensorboard": ("TensorBoardLogger",),
    "mlflow": ("MLFlowLogger",),
    # commands
    "train": ("fit",),
    "finetune": ("fit",),
    "sft": ("fit",),
    "lora": ("fit",),
    "osft": ("fit",),
    "tune": ("fit",),
    "eval": ("validate",),
    "evaluate": ("validate",),
    "generate": ("predict",),
    "infer": ("predict",),
    "inference": ("predict",),
    "ls": ("runs",),
    "ps": ("runs",),
    "check": ("doctor",),
    "merge": ("export",),
}
"""Names in other tools, and our names for the same thing, the best match first."""


def nearest(word: str, names: Iterable[str]) -> str | None:
    """Return the name that the word most likely means, or None if no name is similar."""
    known = list(names)
    plain = _plain(word)
    for name in known:
        if _plain(name) == plain:
            return name
    for name in SYNONYMS.get(word.lower().replace("-", "_"), ()):
        if name in known:
            return name
    scored = [(_similarity(plain, _plain(name)), name) for name in known]
    best = max(scored, key=lambda pair: pair[0], default=(0.0, ""))
    return best[1] if best[0] >= _CLOSE_ENOUGH else None


def _plain(word: str) -> str:
    return word.lower().replace("-", "").replace("_", "")


def _similarity(word: str, name: str) -> float:
    if not word or not name:
        return 0.0
    same_start = 0.05 if word[0] == name[0] else 0.0
    return max(SequenceMatcher(None, word, name).ratio(), SequenceMatcher(None, name, word).ratio()) + same_start


def find_in_other_sections(
    word: str, schema: Schema, here: ClassInfo | None, chosen: dict[str, ClassInfo]
) -> str | None:
    """Return the full key of an option with exactly this name in another section, or None.

    Args:
        word: The key that is unknown here; names of other tools are translated.
        schema: The catalogue.
        here: The class in which the key was written.
        chosen: The classes that the recipe configures, by section.
    """
    wanted = (word, *SYNONYMS.get(word.lower().replace("-", "_"), ()))
    if "seed_everything" in wanted:
        return "seed_everything"
    for name in wanted:
        for section, info in chosen.items():
            if info is not here and name in info.options:
                inside = "init_args." if section in ("model", "data") else ""
                return f"{section}.{inside}{name}"
    return None


def strategy_with(word: str, schema: Schema) -> str | None:
    """Return the name of the strategy class that has an option of this name, or None."""
    return next((info.name for info in schema.of_kind("strategy") if word in info.options), None)
