"""Writes and reads adapter folders in peft's format; a written folder is loaded and compared before it is renamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import psutil
import safetensors.torch
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_hub.checkpoints.export import atomic_folder
from lightning_hub.errors import ConfigError, HubError
from lightning_hub.methods.fingerprint import tensor_fingerprint
from lightning_hub.methods.lora.adapters import ADAPTER_NAME, PREFIX, LoraSettings, initial_factors, layers_of
from lightning_hub.models.pretrained import Pretrained

ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
BASE_HASH = "base_hash"
"""The metadata key of the weights file that has the hash of the base model."""

EXPORT_TOLERANCE = 1e-5
"""The largest allowed difference of logits, relative to the largest logit."""

ADAPTER_OPTION = "model.init_args.adapter"

_ANOTHER = "name the folder of a complete LoRA adapter"


@dataclass(frozen=True)
class Adapter:
    """An adapter as it is written to disk.

    Attributes:
        config: The configuration of peft.
        tensors: Its weights, by the names that peft uses in files.
        base_hash: The hash of its base model.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    base_hash: str


def file_names(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the trained weights of a live model, by the names that peft uses in files."""
    lora = get_peft_model_state_dict(
        model, state_dict=dict(state), adapter_name=ADAPTER_NAME, save_embedding_layers=False
    )
    full = {name: tensor for name, tensor in state.items() if not _is_adapter(name)}
    return {f"{PREFIX}{name}": tensor for name, tensor in {**lora, **full}.items()}


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def export_adapter(
    model: PreTrainedModel, state: Mapping[str, Tensor], config: LoraConfig, base_hash: str, *, is_shifted: bool
) -> Adapter:
    """Return the adapter of a trained model.

    With PiSSA and OLoRA the initial product ``B0 A0`` was subtracted from the frozen weights. For the weights on disk,
    the change is ``B A - B0 A0``: an adapter with twice the rank.

    Args:
        model: The live model.
        state: The full trained weights, by their live names.
        config: The configuration of peft with which the adapters were injected.
        base_hash: The hash of the base model.
        is_shifted: Whether the initial factors were subtracted from the frozen weights.
    """
    config = copy(config)
    config.target_modules = sorted(config.target_modules or [])  # a set has no order
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in file_names(model, state).items()}
    if is_shifted:
        for name, layer in layers_of(model):
            a, b = (f"{PREFIX}{name}.lora_{key}.weight" for key in ("A", "B"))
            start_a, start_b = initial_factors(layer)
            tensors[a] = torch.cat([tensors[a], start_a])
            tensors[b] = torch.cat([tensors[b], -start_b], dim=1)
        config.lora_alpha *= 2**0.5 if config.use_rslora else 2  # type: ignore[assignment]  # typed as an int, but any float works
        config.r *= 2
    return Adapter(config, tensors, base_hash)


def write_adapter(
    target: Path,
    adapter: Adapter,
    tokenizer: PreTrainedTokenizerBase,
    base: Pretrained,
    as_trained: Callable[[PreTrainedModel], None],
) -> None:
    """Write an adapter, load it with peft into a fresh base model, and compare its logits with the trained model's.

    Args:
        target: The folder; an existing one is replaced when the new one is complete.
        adapter: The adapter to write.
        tokenizer: The tokenizer that made the training data, with its chat template.
        base: The base model.
        as_trained: Gives a fresh base model the layers and weights of the trained model, from memory.

    Raises:
        HubError: The written adapter gives other logits than the trained model.
    """
    with atomic_folder(target) as folder:
        metadata = {"format": "pt", BASE_HASH: adapter.base_hash}
        safetensors.torch.save_file(  # cloned: tied weights are written under each of their names
            {name: tensor.clone() for name, tensor in adapter.tensors.items()}, folder / ADAPTER_WEIGHTS_FILE, metadata
        )
        adapter.config.save_pretrained(str(folder))
        tokenizer.save_pretrained(folder)
        fresh = _fresh(base)
        before = {name: tensor_fingerprint(parameter) for name, parameter in fresh.named_parameters()}
        loaded = PeftModel.from_pretrained(fresh, str(folder))
        check_loaded(loaded, adapter.tensors, folder)
        found = probe_logits(loaded)
        fresh = loaded.unload()  # the base model without adapters: reading it a second time is slow
        _check_untouched(fresh, before, adapter.config.modules_to_save or [], folder)
        as_trained(fresh)
        check_answers(found, probe_logits(fresh), folder)


def _check_untouched(base: torch.nn.Module, before: Mapping[str, bytes], trained: Iterable[str], folder: Path) -> None:
    """Reject an adapter that changes the base model when it is loaded: the comparison of logits cannot see this.

    Args:
        base: The base model, after peft has loaded and unloaded the adapter.
        before: The fingerprint of each of its weights before that.
        trained: Modules that the adapter replaces completely (``modules_to_save``).
        folder: The folder of the adapter.

    Raises:
        HubError: A weight has changed.
    """
    replaced = tuple(f"{name}." for name in trained)
    for name, parameter in base.named_parameters():
        if not name.startswith(replaced) and tensor_fingerprint(parameter) != before[name]:
            raise HubError(f"loading the adapter changes {name} of its base model", where=str(folder))


def check_loaded(loaded: PeftModel, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Compare an adapter that peft has loaded with the one in memory: the same names, and equal weights.

    Raises:
        HubError: They differ.
    """
    found = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    different = found.keys() ^ tensors.keys() or {
        name for name, tensor in found.items() if not torch.equal(tensor.cpu().to(tensors[name].dtype), tensors[name])
    }
    if different:
        raise HubError(
            f"{len(different)} weights of the written adapter differ from the trained ones, for example "
            f"{min(different)}",
            where=str(folder),
        )


def check_answers(found: Tensor, expected: Tensor, folder: Path) -> None:
    """Compare logits of shape ``(1, tokens, vocabulary)``.

    Raises:
        HubError: They differ by more than ``EXPORT_TOLERANCE``.
    """
    apart = float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    if not apart <= EXPORT_TOLERANCE:
        raise HubError(f"the written model gives other logits than the one in memory: {apart:.1e}", where=str(folder))


@torch.no_grad()
def probe_logits(model: torch.nn.Module) -> Tensor:
    """Return the logits of 16 tokens, evenly spaced in the vocabulary: float32, shape ``(1, 16, vocabulary)``."""
    model.eval()
    size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]  # any model of transformers has it
    ids = torch.linspace(0, size - 1, 16).long().unsqueeze(0)
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
    return logits


def _fresh(base: Pretrained) -> PreTrainedModel:
    """Load the base model in float32, or in bfloat16 if the free memory is not enough for float32."""
    with torch.device("meta"):
        needed = 4 * base.skeleton(dtype=torch.float32, attn_implementation="eager").num_parameters()
    dtype = torch.float32 if needed * 1.2 < psutil.virtual_memory().available else torch.bfloat16
    return base.load(dtype=dtype, attn_implementation="eager")


def read_config(folder: Path, settings: LoraSettings) -> None:
    """Check that the adapter to continue from has the settings of the recipe.

    Raises:
        ConfigError: There is no adapter, or its settings are different.
    """
    if not (folder / ADAPTER_CONFIG_FILE).is_file() or not (folder / ADAPTER_WEIGHTS_FILE).is_file():
        raise ConfigError(
            f"{folder} is not an adapter: it lacks {ADAPTER_CONFIG_FILE} or {ADAPTER_WEIGHTS_FILE}",
            where=ADAPTER_OPTION,
            remedy=_ANOTHER,
        )
    try:
        found = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ConfigError(
            f"{folder / ADAPTER_CONFIG_FILE} cannot be read ({error})", where=ADAPTER_OPTION, remedy=_ANOTHER
        ) from error
    if not isinstance(found, LoraConfig):
        raise ConfigError(
            f"the adapter in {folder} is of type {found.peft_type}, not LORA", where=ADAPTER_OPTION, remedy=_ANOTHER
        )
    if found.rank_pattern or found.alpha_pattern:
        message = f"the adapter in {folder} has another rank or alpha for some layers (rank_pattern, alpha_pattern)"
        raise ConfigError(message, where=ADAPTER_OPTION, remedy="merge it, and name the merged model as model")
    given = {
        "r": (found.r, settings.r),
        "alpha": (found.lora_alpha, settings.alpha),
        "use_rslora": (found.use_rslora, settings.use_rslora),
        "use_dora": (found.use_dora, settings.use_dora),
    }
    for name, (theirs, ours) in given.items():
        if theirs != ours:
            raise ConfigError(
                f"the adapter in {folder} has {name} {theirs}, the recipe says {ours}",
                where=f"model.init_args.{name}",
                remedy=f"set it to {theirs}",
            )


@torch.no_grad()
def load_adapter(folder: Path, model: PreTrainedModel, base_hash: str) -> None:
    """Load the weights of an adapter folder into the live adapters of a model.

    Raises:
        ConfigError: They belong to another base model, or to other layers.
    """
    live = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = file_names(model, live)
    try:
        with safe_open(folder / ADAPTER_WEIGHTS_FILE, framework="pt") as stream:
            theirs = (stream.metadata() or {}).get(BASE_HASH)
            found = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118  # not a dict
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{folder / ADAPTER_WEIGHTS_FILE} cannot be read ({error})", where=ADAPTER_OPTION, remedy=_ANOTHER
        ) from error
    if base_hash and theirs and theirs != base_hash:
        remedy = "name the model that it was trained on, or another adapter"
        raise ConfigError(f"the adapter in {folder} was trained on another model", where=ADAPTER_OPTION, remedy=remedy)
    for name in sorted(found.keys() ^ names.keys()):
        layer = name.removeprefix(PREFIX)
        side = "the adapter does not contain" if name in names else "the recipe does not train, but the adapter has,"
        raise ConfigError(
            f"{side} {layer}", where=ADAPTER_OPTION, remedy="set targets and modules_to_save as the adapter has them"
        )
    for name, parameter in names.items():
        if found[name].shape != parameter.shape:
            shapes = f"{tuple(found[name].shape)}, this model needs {tuple(parameter.shape)}"
            raise ConfigError(
                f"{name.removeprefix(PREFIX)} of the adapter has the shape {shapes}",
                where=ADAPTER_OPTION,
                remedy=_ANOTHER,
            )
        if not found[name].isfinite().all():
            message = f"{folder / ADAPTER_WEIGHTS_FILE} has NaN or infinite numbers in {name.removeprefix(PREFIX)}"
            raise ConfigError(message, where=ADAPTER_OPTION, remedy=_ANOTHER)
        parameter.copy_(found[name])
