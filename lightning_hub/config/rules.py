"""Rules between options, which the type of one option cannot express."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from lightning_hub.config.recipe import Recipe, keyed_fault
from lightning_hub.config.registry import CLASSES
from lightning_hub.config.suggest import nearest
from lightning_hub.config.yaml_reader import KeyPath, YamlValue
from lightning_hub.errors import ConfigError

MEASURED = ("loss", "grad_norm")
"""Metrics that callbacks can monitor in every run. With validation data there is also ``val_loss``."""

_SHIPPED = frozenset(path.rpartition(".")[2] for path in CLASSES)
_DEVICE_WORDS = re.compile(r"auto|-1|\d+(\s*,\s*\d+)*,?")


def check_rules(recipe: Recipe, filled: dict[str, YamlValue]) -> Iterator[ConfigError]:
    """Yield one fault for each rule that the recipe breaks.

    Args:
        recipe: The recipe as given.
        filled: Its tree with defaults, so that a rule also compares a given option with the default of another.
    """
    full = replace(recipe, tree=filled)
    for rule in (_accumulation, _devices, _sampler, _lengths, _batch_size, _warmup):
        fault = rule(full)
        if fault:
            path, message, remedy = fault
            yield keyed_fault(recipe, path, message, remedy)
    yield from _remote_code(recipe)
    yield from _metrics(recipe)


_Fault = tuple[str, str, str] | None


def _accumulation(recipe: Recipe) -> _Fault:
    path = "trainer.accumulate_grad_batches"
    given = recipe.get(path)
    if given is None or given == 1:
        return None
    remedy = "remove it and set data.init_args.effective_batch_size (samples of one step over all ranks)"
    return path, f"{given} cannot be used: a batch is already a complete optimizer step, accumulated exactly", remedy


def _devices(recipe: Recipe) -> _Fault:
    path = "trainer.devices"
    given = recipe.get(path)
    remedy = "give a number, a list of device indices or auto"
    if isinstance(given, str) and not _DEVICE_WORDS.fullmatch(given):
        return path, f"{given!r} is not a number of devices", remedy
    if isinstance(given, int) and (given == 0 or given < -1):
        return path, f"{given} is not a number of devices", remedy
    return None


def _sampler(recipe: Recipe) -> _Fault:
    path = "trainer.use_distributed_sampler"
    if recipe.get(path) is not True:
        return None
    return path, "true would split the optimizer steps over the ranks, and each rank would train only some", "remove it"


def _lengths(recipe: Recipe) -> _Fault:
    longest = recipe.get("data.init_args.max_seq_len")
    row = recipe.get("data.init_args.max_tokens_per_gpu")
    if not isinstance(longest, int) or not isinstance(row, int) or longest <= row:
        return None
    path = "data.init_args.max_seq_len"
    return path, f"{longest} is more than max_tokens_per_gpu ({row}): such a sample fits no packed row", "lower it"


def _batch_size(recipe: Recipe) -> _Fault:
    size = recipe.get("data.init_args.effective_batch_size")
    return batch_size_fault(size, recipe.get("data.init_args.tokens_per_step"))


def batch_size_fault(effective_batch_size: object, tokens_per_step: object) -> _Fault:
    """Return the fault of a step whose size is set twice, or None."""
    if effective_batch_size is None or tokens_per_step is None:
        return None
    message = "given together with effective_batch_size: both set the size of a step"
    return "data.init_args.tokens_per_step", message, "keep one of them"


def _warmup(recipe: Recipe) -> _Fault:
    steps = recipe.get("model.init_args.warmup_steps")
    return warmup_fault(steps, recipe.get("model.init_args.warmup_ratio"))


def warmup_fault(warmup_steps: object, warmup_ratio: object) -> _Fault:
    """Return the fault of a warm-up whose length is set twice, or None."""
    if not warmup_steps or not warmup_ratio:
        return None
    message = "given together with warmup_steps: both set the length of the warm-up"
    return "model.init_args.warmup_ratio", message, "keep one of them"


def refuse(fault: _Fault) -> None:
    """Raise the error of a fault, for classes that Python code constructs without a recipe.

    Raises:
        ConfigError: There is one.
    """
    if fault is not None:
        path, message, remedy = fault
        raise ConfigError(message, where=path, remedy=remedy)


def _remote_code(recipe: Recipe) -> Iterator[ConfigError]:
    for path, key, _ in _mappings(recipe.tree, ()):
        if key.replace("-", "_") == "trust_remote_code":
            remedy = "remove it and, if you trust the model, give the flag --trust-remote-code"
            yield keyed_fault(recipe, (*path, key), "a recipe cannot allow a model to run its own code", remedy)


def _metrics(recipe: Recipe) -> Iterator[ConfigError]:
    """Refuse to monitor a metric that is never measured. Lightning would notice it late, or never."""
    listed = recipe.get("trainer.callbacks")
    callbacks = [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    classes = [recipe.get("model.class_path"), *(item.get("class_path") for item in callbacks)]
    if not _SHIPPED.issuperset(map(_short, classes)):
        return  # a class that is not ours can log any metric
    known = [*MEASURED, "val_loss"]
    watched = [("checkpoint.best.metric", recipe.get("checkpoint.best.metric"))]
    for index, item in enumerate(callbacks):
        options = item.get("init_args")
        if isinstance(options, dict):
            names = options.get("eval_also")
            known += [f"forgetting/{name}" for name in names] if isinstance(names, dict) else []
            if options.get("strict") is not False:
                watched.append((f"trainer.callbacks.{index}.init_args.monitor", options.get("monitor")))
    for path, metric in watched:
        if metric == "val_loss" and recipe.get("data.init_args.val") is None:
            yield keyed_fault(recipe, path, "val_loss is never measured: there is no validation data", "set data.val")
        elif isinstance(metric, str) and metric not in known and not metric.startswith("${env:"):
            near = nearest(metric, known)
            remedy = f"did you mean {near}?" if near else f"there are {', '.join(known)}"
            yield keyed_fault(recipe, path, f"{metric!r} is never measured", remedy)


def _short(name: YamlValue) -> str:
    return str(name).rpartition(".")[2]


def _mappings(value: YamlValue, path: KeyPath) -> Iterator[tuple[KeyPath, str, YamlValue]]:
    """Yield each key of each mapping as (path of the mapping, key, value)."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield path, key, child
            yield from _mappings(child, (*path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _mappings(child, (*path, index))


# ---- methods and the number of processes -----------------------------------------------------------------------------


def check_processes(recipe: Recipe, tp: int, world_size: int) -> None:
    """Refuse options of the method that do not work with this number of processes. The defaults work with any number.

    Args:
        recipe: The recipe.
        tp: The tensor-parallel size.
        world_size: The number of ranks.

    Raises:
        ConfigError: The method cannot train with these processes.
    """
    use_dora = recipe.get("model.init_args.use_dora") is True
    quantization = str(recipe.get("model.init_args.quantization") or "none")
    check_adapters(use_dora=use_dora, quantization=quantization, tp=tp, world_size=world_size)


def check_adapters(*, use_dora: bool, quantization: str, tp: int, world_size: int) -> None:
    """Refuse adapters that do not work with this number of processes.

    Args:
        use_dora: Whether DoRA is used, which trains the norm of each weight column.
        quantization: How the frozen weights are quantized.
        tp: The tensor-parallel size.
        world_size: The number of ranks.
    """
    if use_dora and tp > 1:
        raise ConfigError(
            f"use_dora does not work with tensor parallelism (tp {tp}): it needs the norms of complete columns",
            where="model.init_args.use_dora",
            remedy="use the strategy fsdp",
        )
    if quantization != "none" and world_size > 1:
        raise ConfigError(
            f"{quantization} weights can be trained by one process only, but the run has {world_size}",
            where="model.init_args.quantization",
            remedy="set trainer.devices: 1, or leave it out",
        )
