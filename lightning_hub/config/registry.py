"""The classes in the option schema. This module has only names, so its import is fast.

``scripts/make_schema.py`` imports each name, reads its signature and docstring and writes ``schema.json``.
To add a class, add one line here.
"""

from __future__ import annotations

from lightning_hub.config.yaml_reader import YamlValue

_CALLBACKS = "lightning.pytorch.callbacks."
_LOGGERS = "lightning.pytorch.loggers."
_STRATEGIES = "lightning.pytorch.strategies."

CLASSES: dict[str, str] = {
    "lightning.pytorch.Trainer": "trainer",
    "lightning_hub.checkpoints.settings.CheckpointSettings": "checkpoint",
    "lightning_hub.methods.sft.SFT": "model",
    "lightning_hub.methods.lora.LoRA": "model",
    "lightning_hub.methods.osft.OSFT": "model",
    "lightning_hub.data.datamodule.ChatData": "data",
    "lightning_hub.callbacks.forgetting.Forgetting": "callback",
    "lightning_hub.callbacks.generate_samples.GenerateSamples": "callback",
    _CALLBACKS + "DeviceStatsMonitor": "callback",
    _CALLBACKS + "EarlyStopping": "callback",
    _CALLBACKS + "EMAWeightAveraging": "callback",
    _CALLBACKS + "LearningRateMonitor": "callback",
    _CALLBACKS + "ModelCheckpoint": "callback",
    _CALLBACKS + "ModelSummary": "callback",
    _CALLBACKS + "RichModelSummary": "callback",
    _CALLBACKS + "RichProgressBar": "callback",
    _CALLBACKS + "SpikeDetection": "callback",
    _CALLBACKS + "StochasticWeightAveraging": "callback",
    _CALLBACKS + "Timer": "callback",
    _CALLBACKS + "TQDMProgressBar": "callback",
    _LOGGERS + "CSVLogger": "logger",
    _LOGGERS + "CometLogger": "logger",
    _LOGGERS + "MLFlowLogger": "logger",
    _LOGGERS + "TensorBoardLogger": "logger",
    _LOGGERS + "WandbLogger": "logger",
    "lightning_hub.parallel.strategies.FSDP": "strategy",
    "lightning_hub.parallel.strategies.ModelParallel": "strategy",
    _STRATEGIES + "DDPStrategy": "strategy",
    _STRATEGIES + "SingleDeviceStrategy": "strategy",
}
"""Dotted name to kind: trainer, checkpoint, model, data, callback, logger or strategy."""

SHOWN_AS: dict[str, str] = {"CausalLMModule": "SFT"}
"""Base classes that a recipe cannot name, and the class under whose name their options are listed."""

TYPES: dict[str, str] = {
    "Trainer.accelerator": "'auto' | 'cpu' | 'gpu' | 'cuda' | 'mps'",
    "Trainer.strategy": "'auto' | 'ddp' | 'fsdp' | 'model_parallel' | class[strategy]",
    "Trainer.devices": "int | 'auto' | list[int] | str",
    "Trainer.logger": "bool | class[logger] | list[class[logger]] | null",
    "Trainer.callbacks": "list[class[callback]] | class[callback] | null",
    "Trainer.gradient_clip_algorithm": "'norm' | 'value' | null",
    "Trainer.profiler": "'simple' | 'advanced' | 'pytorch' | null",
    "Trainer.plugins": "null",
    "Trainer.max_time": "duration | null",
    "Trainer.val_check_interval": "int | float | duration | null",
    "Trainer.precision": "'32-true' | '16-true' | '16-mixed' | 'bf16-true' | 'bf16-mixed' | '64-true'"
    " | '32' | '16' | 'bf16' | '64' | 32 | 16 | 64 | null",
    "EarlyStopping.mode": "'min' | 'max'",
    "ModelCheckpoint.mode": "'min' | 'max'",
    "Timer.duration": "duration | null",
    "Timer.interval": "'step' | 'epoch'",
    "RichProgressBar.console_kwargs": "null",
    **{f"{logger}.save_dir": "str | null" for logger in ("CSVLogger", "TensorBoardLogger", "WandbLogger")},
    "MLFlowLogger.tags": "map[str, str] | null",
}
"""Types that are not in a signature: values that Lightning checks late, or never."""

DEFAULTS: dict[str, YamlValue] = {
    "Trainer.use_distributed_sampler": False,  # Lightning's sampler drops steps without a message
    "Trainer.logger": False,  # the run folder has the metrics; other loggers are optional
    "Trainer.num_sanity_val_steps": 0,  # -1 validates before the first step
    "Trainer.log_every_n_steps": 10,
    "Trainer.precision": "32-true",
    **{f"{logger}.save_dir": None for logger in ("CSVLogger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger")},
}
"""Our defaults, where those of Lightning would train wrong or write outside the run folder."""

RANGES: dict[str, str] = {
    "Trainer.num_nodes": ">= 1",
    "Trainer.max_epochs": ">= -1",
    "Trainer.max_steps": ">= -1",
    "Trainer.log_every_n_steps": ">= 0",
    "Trainer.gradient_clip_val": ">= 0",
    "Trainer.accumulate_grad_batches": ">= 1",
    "EarlyStopping.patience": ">= 0",
}
"""Bounds of Lightning's options, by ``Class.option``. Those of our own options are in their annotations."""

REFUSED: dict[str, str] = {
    "GradientAccumulationScheduler": "gradients are accumulated by data.init_args.effective_batch_size",
    "BatchSizeFinder": "a packed row has at most data.init_args.max_tokens_per_gpu tokens",
    "LearningRateFinder": "set model.init_args.learning_rate",
    "BackboneFinetuning": "it takes Python functions, and a language model has no backbone to unfreeze",
    "LambdaCallback": "it takes Python functions: write a callback class and give --allow-class",
    "ModelPruning": "pruned weights cannot be exported as a plain model folder",
}
"""Lightning classes that would make the training step or the export wrong, with what to use instead."""

LIGHTNING_CLI_SECTIONS: dict[str, str] = {
    "optimizer": "set model.init_args.learning_rate, betas, eps and weight_decay",
    "lr_scheduler": "set model.init_args.lr_scheduler and warmup_steps",
    "ckpt_path": "give --resume PATH",
    "config": "give --config FILE several times; the later file wins",
    "fit": "write its content at the top level, without fit:",
}
"""Sections of LightningCLI that a recipe does not have, with what to write instead."""
