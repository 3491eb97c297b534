"""Adapters beside the layers of a model: where they are put, what they start from, and how they are told."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_hub.errors import ConfigError
from lightning_hub.methods.fingerprint import tensor_fingerprint
from lightning_hub.methods.lora.layers import compute_in_layer_dtype
from lightning_hub.methods.targets import (
    WeightMatrix,
    describe_matrices,
    reject_tied_weights,
    resolve_targets,
    weight_matrices,
)

Init = Literal["default", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "pissa_niter_16", "olora", "eva"]

BASE_MODIFYING_INITS = ("pissa", "olora")
"""Beginnings of the inits whose adapters are no zero at the start: as much is taken out of the frozen weights."""

EVA = "eva"
"""The init whose adapters start at what the layers are given: it is filled in when the model is read."""

ADAPTER_NAME = "default"
"""What peft calls an adapter that nobody has named."""

PREFIX = "base_model.model."
"""What peft puts before the names of a model in adapter files."""

INIT_OPTION = "model.init_args.init"

INIT_SEED = 0
"""Seed of an approximate decomposition, which has to come out the same at a resume."""


@dataclass(frozen=True)
class LoraSettings:
    """What adapters are, as a recipe says it.

    Attributes:
        r: Rank.
        alpha: Strength: an adapter's output is scaled by ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``.
        dropout: Share of an adapter's inputs that is left out while training.
        targets: Which layers are adapted, as `resolve_targets` takes them.
        modules_to_save: Modules that are trained whole.
        use_rslora: Scale by the root of the rank.
        use_dora: Train the length of each weight column apart from its direction.
        init: What adapters start from.
    """

    r: int
    alpha: float
    dropout: float
    targets: str | Sequence[str]
    modules_to_save: Sequence[str]
    use_rslora: bool
    use_dora: bool
    init: Init


def inject_adapters(model: PreTrainedModel, settings: LoraSettings, base: str) -> LoraConfig:
    """Freeze a model, put adapters beside its target layers, and return how peft describes them.

    The layers are replaced in place: class, names outside of the layers, forward and generation of the model stay
    what they were, so nothing above has to know of adapters. On the meta device nothing is computed: the values come
    from the process that has read the weights. Random numbers are drawn from a copy of the generator's state, so that
    a process that draws them goes on like one that does not.

    Args:
        model: A model, with or without memory.
        settings: What the adapters are.
        base: Name of the model, for the files of the adapter.

    Raises:
        ConfigError: A name matches nothing, or the wishes do not go together; the model is as it was.
    """
    config, trained = build_lora_config(model, settings, base)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", ".*fan_in_fan_out.*")
        if settings.init.startswith("pissa_niter"):
            torch.manual_seed(INIT_SEED)
        try:
            inject_adapter_in_model(config, model, ADAPTER_NAME)
        except (ValueError, TypeError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"peft cannot adapt this model so ({reason})",
                where="model.init_args",
                remedy="leave that option out, or the layers that it is not for out of targets",
            ) from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # steps of adapters are too small for bfloat16
    compute_in_layer_dtype(model)
    config.modules_to_save = trained or None
    config.init_lora_weights = True  # whoever reads the adapter needs no other start
    for name in trained:
        model.get_submodule(name).requires_grad_(True)
    if modifies_base(settings.init):
        _store_initial_factors(model)
    return config


def build_lora_config(model: PreTrainedModel, settings: LoraSettings, base: str) -> tuple[LoraConfig, list[str]]:
    """Return how peft describes the adapters that a model is to have, and the modules that are trained whole.

    Raises:
        ConfigError: A name matches nothing, or the wishes do not go together.
    """
    trained = whole_modules(model, settings.modules_to_save)
    whole = tuple(f"{name}." for name in trained)
    found = [matrix for matrix in resolve_targets(model, settings.targets) if not matrix.full_name.startswith(whole)]
    if not found:
        message = "all that targets name is trained whole, as modules_to_save says"
        raise ConfigError(message, where="model.init_args.targets", remedy="leave some of it to the adapters")
    reject_tied_weights(found, remedy="leave it out, or train it whole with modules_to_save")
    _check_base_modifying(model, found, settings)
    return _config(model, found, settings, base), trained


def modifies_base(init: str) -> bool:
    """Say whether an init takes the adapters' start out of the frozen weights."""
    return init.startswith(BASE_MODIFYING_INITS)


def whole_modules(model: PreTrainedModel, entries: Sequence[str]) -> list[str]:
    """Return the modules that ``modules_to_save`` names, and those that share their weights.

    Raises:
        ConfigError: An entry names no module that has weights, or one whose weights are quantized.
    """
    owners = {name: module for name, module in model.named_modules() if next(module.parameters(), None) is not None}
    chosen: list[str] = []
    for entry in entries:
        found = [name for name in owners if name == entry or name.endswith(f".{entry}")]
        if not entry or not found:
            raise ConfigError(
                f"{entry!r} names no module of this model",
                where="model.init_args.modules_to_save",
                remedy=f"it has {describe_matrices(weight_matrices(model))}",
            )
        if isinstance(owners[found[0]], nn.ModuleList | nn.ModuleDict):
            raise ConfigError(
                f"{entry!r} is a list of modules, which peft cannot save as one",
                where="model.init_args.modules_to_save",
                remedy=f"name what it holds, as {next(name for name in owners if name.startswith(f'{found[0]}.'))}",
            )
        if any(not parameter.is_floating_point() for name in found for parameter in owners[name].parameters()):
            raise ConfigError(
                f"{entry!r} is quantized, so it cannot be trained whole",
                where="model.init_args.modules_to_save",
                remedy="adapt it, or leave quantization out",
            )
        chosen += found
    weights = {id(parameter) for name in chosen for parameter in owners[name].parameters()}
    tied = [name for name, module in owners.items() if weights & {id(own) for own in module.parameters(recurse=False)}]
    inside = tuple(f"{name}." for name in chosen)
    return [name for name in owners if name in [*chosen, *tied] and not name.startswith(inside)]


def _check_base_modifying(model: PreTrainedModel, found: Iterable[WeightMatrix], settings: LoraSettings) -> None:
    """Refuse layers that an init cannot take a start out of: peft would fail late, or start somewhere else.

    Raises:
        ConfigError: There is one.
    """
    for matrix in found if modifies_base(settings.init) else ():
        least = min(matrix.shape)
        is_known = isinstance(model.get_submodule(matrix.module), nn.Linear)
        if not is_known and not (matrix.is_transposed and settings.init != "olora"):
            message = f"init {settings.init} is for plain linear layers, not for {matrix.name}"
            raise ConfigError(message, where=INIT_OPTION, remedy="take another init, or leave it out of targets")
        if settings.r > least:
            shape = " x ".join(map(str, matrix.shape))
            message = f"r {settings.r} is more than the {least} directions of {matrix.name} ({shape})"
            remedy = f"init {settings.init} takes {least} at most: lower r, or take another init"
            raise ConfigError(message, where="model.init_args.r", remedy=remedy)


def _config(model: PreTrainedModel, found: Sequence[WeightMatrix], settings: LoraSettings, base: str) -> LoraConfig:
    layers = [matrix for matrix in found if isinstance(model.get_submodule(matrix.module), (nn.Linear, Conv1D))]
    others = [matrix for matrix in found if matrix not in layers]
    embeddings = [matrix for matrix in others if isinstance(model.get_submodule(matrix.module), nn.Embedding)]
    on_meta = next(model.parameters()).is_meta
    start = {"default": True, EVA: True}.get(settings.init, settings.init)
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=settings.r,
        lora_alpha=cast("int", settings.alpha),  # typed as a whole number, used as any
        lora_dropout=settings.dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=False if on_meta else start,  # type: ignore[arg-type]  # one of the words it knows
        target_modules=[matrix.module for matrix in [*layers, *embeddings]],
        target_parameters=[matrix.full_name for matrix in others if matrix not in embeddings] or None,
        fan_in_fan_out=bool(layers) and all(matrix.is_transposed for matrix in layers),
    )


def layers_of(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yield the adapted layers of a model with their names."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _store_initial_factors(model: nn.Module) -> None:
    """Keep what the adapters start from: the frozen weights lack it, so an adapter for the whole ones needs it."""
    for _, layer in layers_of(model):
        for key in ("A", "B"):
            weight: Tensor = getattr(layer, f"lora_{key}")[ADAPTER_NAME].weight
            cast("nn.Module", layer).register_buffer(f"start_{key}", weight.detach().clone(), persistent=False)


def initial_factors(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """Return what the ``A`` and ``B`` of a layer have started from, on the host."""
    held = cast("nn.Module", layer)
    return held.get_buffer("start_A").cpu(), held.get_buffer("start_B").cpu()


def hash_of_base(model: nn.Module) -> str:
    """Return a hash of a model as it was read: names, shapes, and numbers from all over each tensor.

    Numbers are rounded to bfloat16 first, so that the hash is the same in whichever precision a model was read.
    """
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(f"{name} {tuple(parameter.shape)}".encode())
        found.update(tensor_fingerprint(parameter))
    return found.hexdigest()


def describe_adapters(model: nn.Module, settings: LoraSettings, trained: Sequence[str]) -> list[str]:
    """Return lines about what is adapted: how many layers of which name and shape."""
    kinds: Counter[str] = Counter()
    for name, layer in layers_of(model):
        shape = f"{layer.in_features} -> {layer.out_features}"
        last = name.removesuffix(".base_layer").rpartition(".")[2]
        own = getattr(layer, "parameter_name", "weight")  # matrices that lie in no layer of their own
        kinds[f"{last if own == 'weight' else f'{last}.{own}'} ({shape})"] += 1
    listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    scale = f"{settings.alpha:g} / {'sqrt ' if settings.use_rslora else ''}{settings.r}"
    variant = " (DoRA)" if settings.use_dora else ""
    lines = [f"lora   rank {settings.r}, scaled by {scale}{variant}, beside {listed}"]
    return lines + [f"       trained whole: {', '.join(trained)}"] * bool(trained)
