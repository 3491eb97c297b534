"""Injects adapters into a model, with their initial values, and describes them."""

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
"""Prefixes of the inits whose product ``B A`` is not zero at the start: it is subtracted from the frozen weights."""

EVA = "eva"
"""The init that computes ``A`` from the inputs of the layers, when the model is loaded."""

ADAPTER_NAME = "default"
"""The name that peft gives to an adapter without a name."""

PREFIX = "base_model.model."
"""What peft puts before the names of a model in adapter files."""

INIT_OPTION = "model.init_args.init"

INIT_SEED = 0
"""Seed of an approximate decomposition: it must give the same result at a resume."""


@dataclass(frozen=True)
class LoraSettings:
    """The settings of the adapters, from the recipe.

    Attributes:
        r: Rank.
        alpha: Scale: an adapter's output is scaled by ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``.
        dropout: Dropout probability of an adapter's inputs during training.
        targets: The layers to adapt, in the form that `resolve_targets` takes.
        modules_to_save: Modules whose weights are all trained.
        use_rslora: Scale by the root of the rank.
        use_dora: Train the magnitude of each weight column separately from its direction (DoRA).
        init: How the adapters are initialised.
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
    """Freeze a model, inject adapters into its target layers, and return the configuration of peft.

    The layers are replaced in place. The class of the model, its forward and its generation do not change, so other
    code does not depend on adapters. On the meta device nothing is computed: the values come from the rank that has
    loaded the weights. Random numbers are drawn from a copy of the generator's state, so the state of the generator
    is afterwards the same on every rank.

    Args:
        model: The model; it may be on the meta device.
        settings: The settings of the adapters.
        base: Name of the base model, for the files of the adapter.

    Raises:
        ConfigError: A name matches nothing, or options do not fit together; the model is unchanged.
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
                f"peft cannot adapt this model with these options ({reason})",
                where="model.init_args",
                remedy="remove the option that peft names, or remove the layers from targets",
            ) from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # steps of adapters are too small for bfloat16
    compute_in_layer_dtype(model)
    config.modules_to_save = trained or None
    config.init_lora_weights = True  # a reader of the adapter file must not initialise it in another way
    for name in trained:
        model.get_submodule(name).requires_grad_(True)
    if modifies_base(settings.init):
        _store_initial_factors(model)
    return config


def build_lora_config(model: PreTrainedModel, settings: LoraSettings, base: str) -> tuple[LoraConfig, list[str]]:
    """Return the configuration of peft for a model, and the names of the modules that are fully trained.

    Raises:
        ConfigError: A name matches nothing, or options do not fit together.
    """
    trained = fully_trained_modules(model, settings.modules_to_save)
    inside = tuple(f"{name}." for name in trained)
    found = [matrix for matrix in resolve_targets(model, settings.targets) if not matrix.full_name.startswith(inside)]
    if not found:
        message = "modules_to_save already trains all layers that targets names"
        raise ConfigError(message, where="model.init_args.targets", remedy="remove some of them from modules_to_save")
    reject_tied_weights(found, remedy="remove it from targets, or train it with modules_to_save")
    _check_base_modifying(model, found, settings)
    return _config(model, found, settings, base), trained


def modifies_base(init: str) -> bool:
    """Return whether an init subtracts the initial product of the factors from the frozen weights."""
    return init.startswith(BASE_MODIFYING_INITS)


def fully_trained_modules(model: PreTrainedModel, entries: Sequence[str]) -> list[str]:
    """Return the names of the modules that ``modules_to_save`` names, and of those that share their weights.

    Raises:
        ConfigError: An entry does not name a module with weights, or names one with quantized weights.
    """
    owners = {name: module for name, module in model.named_modules() if next(module.parameters(), None) is not None}
    chosen: list[str] = []
    for entry in entries:
        found = [name for name in owners if name == entry or name.endswith(f".{entry}")]
        if not entry or not found:
            raise ConfigError(
                f"{entry!r} is not a module of this model",
                where="model.init_args.modules_to_save",
                remedy=f"name some of these: {describe_matrices(weight_matrices(model))}",
            )
        if isinstance(owners[found[0]], nn.ModuleList | nn.ModuleDict):
            raise ConfigError(
                f"{entry!r} is a list of modules, which peft cannot save as one",
                where="model.init_args.modules_to_save",
                remedy=f"name its modules, as {next(name for name in owners if name.startswith(f'{found[0]}.'))}",
            )
        if any(not parameter.is_floating_point() for name in found for parameter in owners[name].parameters()):
            raise ConfigError(
                f"{entry!r} is quantized, so its weights cannot be trained",
                where="model.init_args.modules_to_save",
                remedy="name it in targets, or remove quantization",
            )
        chosen += found
    weights = {id(parameter) for name in chosen for parameter in owners[name].parameters()}
    tied = [name for name, module in owners.items() if weights & {id(own) for own in module.parameters(recurse=False)}]
    inside = tuple(f"{name}." for name in chosen)
    return [name for name in owners if name in [*chosen, *tied] and not name.startswith(inside)]


def _check_base_modifying(model: PreTrainedModel, found: Iterable[WeightMatrix], settings: LoraSettings) -> None:
    """Reject layers that an init cannot decompose: peft would fail later, or use another init without a message.

    Raises:
        ConfigError: There is such a layer.
    """
    for matrix in found if modifies_base(settings.init) else ():
        least = min(matrix.shape)
        is_known = isinstance(model.get_submodule(matrix.module), nn.Linear)
        if not is_known and not (matrix.is_transposed and settings.init != "olora"):
            message = f"init {settings.init} is for plain linear layers, not for {matrix.name}"
            raise ConfigError(message, where=INIT_OPTION, remedy="use another init, or remove the layer from targets")
        if settings.r > least:
            shape = " x ".join(map(str, matrix.shape))
            message = f"r {settings.r} is more than the {least} directions of {matrix.name} ({shape})"
            remedy = f"init {settings.init} allows {least} at most: lower r, or use another init"
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
        lora_alpha=cast("int", settings.alpha),  # typed as an int, but any float works
        lora_dropout=settings.dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=False if on_meta else start,  # type: ignore[arg-type]  # a value that peft knows
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
    """Keep the initial factors: they were subtracted from the frozen weights, and the export needs them."""
    for _, layer in layers_of(model):
        for key in ("A", "B"):
            weight: Tensor = getattr(layer, f"lora_{key}")[ADAPTER_NAME].weight
            cast("nn.Module", layer).register_buffer(f"start_{key}", weight.detach().clone(), persistent=False)


def initial_factors(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """Return the initial ``A`` (r, in) and ``B`` (out, r) of a layer, float32 on the host."""
    module = cast("nn.Module", layer)
    return module.get_buffer("start_A").cpu(), module.get_buffer("start_B").cpu()


def hash_of_base(model: nn.Module) -> str:
    """Return a hash of a model as it was loaded: names, shapes, and a fingerprint of each tensor.

    Numbers are rounded to bfloat16 first, so the hash does not depend on the dtype in which the model was loaded.
    """
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(f"{name} {tuple(parameter.shape)}".encode())
        found.update(tensor_fingerprint(parameter))
    return found.hexdigest()


def describe_adapters(model: nn.Module, settings: LoraSettings, trained: Sequence[str]) -> list[str]:
    """Return lines about the adapters: how many layers, with their name and shape."""
    kinds: Counter[str] = Counter()
    for name, layer in layers_of(model):
        shape = f"{layer.in_features} -> {layer.out_features}"
        last = name.removesuffix(".base_layer").rpartition(".")[2]
        own = getattr(layer, "parameter_name", "weight")  # expert matrices are parameters, not layers
        kinds[f"{last if own == 'weight' else f'{last}.{own}'} ({shape})"] += 1
    listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    scale = f"{settings.alpha:g} / {'sqrt ' if settings.use_rslora else ''}{settings.r}"
    variant = " (DoRA)" if settings.use_dora else ""
    lines = [f"lora   rank {settings.r}, scaled by {scale}{variant}, beside {listed}"]
    if trained:
        lines.append(f"       trained whole: {', '.join(trained)}")
    return lines
