"""Adapter folders: written in the form of peft, read back into a fresh model, and compared before they get a name."""

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
"""Where the weights' file says which base they were trained on."""

EXPORT_TOLERANCE = 1e-5
"""How far logits may be apart, as a share of the largest."""

ADAPTER_OPTION = "model.init_args.adapter"

_ANOTHER = "name the folder of a whole adapter of LoRA"


@dataclass(frozen=True)
class Adapter:
    """An adapter as it is written.

    Attributes:
        config: What peft has to know.
        tensors: Its weights, by the names of peft's files.
        base_hash: The base it belongs to.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    base_hash: str


def file_names(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return trained weights of a live model by the names of peft's files."""
    lora = get_peft_model_state_dict(
        model, state_dict=dict(state), adapter_name=ADAPTER_NAME, save_embedding_layers=False
    )
    whole = {name: tensor for name, tensor in state.items() if not _is_adapter(name)}
    return {f"{PREFIX}{name}": tensor for name, tensor in {**lora, **whole}.items()}


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def export_adapter(
    model: PreTrainedModel, state: Mapping[str, Tensor], config: LoraConfig, base_hash: str, *, is_shifted: bool
) -> Adapter:
    """Return the adapter of a trained model.

    Where the start was taken out of the frozen weights, it is put back: ``B A - B0 A0`` is an adapter of twice the
    rank for the weights as they are on disk.

    Args:
        model: The live model.
        state: The whole trained weights, by their live names.
        config: What peft has made it of.
        base_hash: The base it belongs to.
        is_shifted: Whether the start was taken out of the frozen weights.
    """
    config = copy(config)
    config.target_modules = sorted(config.target_modules or [])  # a set has any order
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in file_names(model, state).items()}
    if is_shifted:
        for name, layer in layers_of(model):
            a, b = (f"{PREFIX}{name}.lora_{key}.weight" for key in ("A", "B"))
            start_a, start_b = initial_factors(layer)
            tensors[a] = torch.cat([tensors[a], start_a])
            tensors[b] = torch.cat([tensors[b], -start_b], dim=1)
        config.lora_alpha *= 2**0.5 if config.use_rslora else 2  # type: ignore[assignment]  # typed as a whole number
        config.r *= 2
    return Adapter(config, tensors, base_hash)


def write_adapter(
    target: Path,
    adapter: Adapter,
    tokenizer: PreTrainedTokenizerBase,
    base: Pretrained,
    as_trained: Callable[[PreTrainedModel], None],
) -> None:
    """Write an adapter, load it into a fresh base as anyone would, and compare answers with those of the trained one.

    Args:
        target: The folder; one that exists is replaced by the finished new one.
        adapter: What is written.
        tokenizer: The tokenizer that made the training data, with its chat template.
        base: The model that it was trained on.
        as_trained: Gives a fresh base the layers and weights of the trained model, without the files.

    Raises:
        HubError: What was written does not answer as what was trained.
    """
    with atomic_folder(target) as folder:
        metadata = {"format": "pt", BASE_HASH: adapter.base_hash}
        safetensors.torch.save_file(  # tied weights stand under each of their names
            {name: tensor.clone() for name, tensor in adapter.tensors.items()}, folder / ADAPTER_WEIGHTS_FILE, metadata
        )
        adapter.config.save_pretrained(str(folder))
        tokenizer.save_pretrained(folder)
        fresh = _fresh(base)
        before = {name: tensor_fingerprint(parameter) for name, parameter in fresh.named_parameters()}
        loaded = PeftModel.from_pretrained(fresh, str(folder))
        check_loaded(loaded, adapter.tensors, folder)
        found = probe_logits(loaded)
        fresh = loaded.unload()  # a base without adapters again: reading it a second time takes as long as training
        _check_untouched(fresh, before, adapter.config.modules_to_save or [], folder)
        as_trained(fresh)
        check_answers(found, probe_logits(fresh), folder)


def _check_untouched(base: torch.nn.Module, before: Mapping[str, bytes], trained: Iterable[str], folder: Path) -> None:
    """Refuse an adapter whose reading changes the base: both sides of the comparison would have the change.

    Args:
        base: The base, after peft has put the adapter in and taken it out.
        before: The fingerprint of each of its weights as it was read.
        trained: Modules that the adapter brings whole.
        folder: The adapter's.

    Raises:
        HubError: A weight is another one.
    """
    whole = tuple(f"{name}." for name in trained)
    for name, parameter in base.named_parameters():
        if not name.startswith(whole) and tensor_fingerprint(parameter) != before[name]:
            raise HubError(f"reading the adapter changes {name} of its base", where=str(folder))


def check_loaded(loaded: PeftModel, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Compare an adapter that peft has loaded with the one in memory: every weight, and no other.

    Raises:
        HubError: They differ.
    """
    found = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    different = found.keys() ^ tensors.keys() or {
        name for name, tensor in found.items() if not torch.equal(tensor.cpu().to(tensors[name].dtype), tensors[name])
    }
    if different:
        raise HubError(
            f"{len(different)} weights of the adapter are not what was trained when it is read again, "
            f"{min(different)} for one",
            where=str(folder),
        )


def check_answers(found: Tensor, expected: Tensor, folder: Path) -> None:
    """Compare logits.

    Raises:
        HubError: They are further apart than rounding explains.
    """
    apart = float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    if not apart <= EXPORT_TOLERANCE:
        raise HubError(f"read again, the model answers differently: logits are {apart:.1e} apart", where=str(folder))


@torch.no_grad()
def probe_logits(model: torch.nn.Module) -> Tensor:
    """Return the logits of a few tokens from all over the vocabulary, in float32."""
    model.eval()
    size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]  # any model of transformers has it
    ids = torch.linspace(0, size - 1, 16).long().unsqueeze(0)
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
    return logits


def _fresh(base: Pretrained) -> PreTrainedModel:
    """Read the base in float32, or in bfloat16 where this machine has no room for that."""
    with torch.device("meta"):
        needed = 4 * base.skeleton(dtype=torch.float32, attn_implementation="eager").num_parameters()
    dtype = torch.float32 if needed * 1.2 < psutil.virtual_memory().available else torch.bfloat16
    return base.load(dtype=dtype, attn_implementation="eager")


def read_config(folder: Path, settings: LoraSettings) -> None:
    """Check that the adapter to go on from is what the recipe says.

    Raises:
        ConfigError: There is none, or the recipe says otherwise.
    """
    if not (folder / ADAPTER_CONFIG_FILE).is_file() or not (folder / ADAPTER_WEIGHTS_FILE).is_file():
        raise ConfigError(
            f"{folder} holds no adapter ({ADAPTER_CONFIG_FILE}, {ADAPTER_WEIGHTS_FILE})",
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
        message = f"the adapter in {folder} has ranks or strengths of its own for some layers"
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
    """Give the live adapters of a model the weights of a folder.

    Raises:
        ConfigError: They were made for another base, or for other layers.
    """
    live = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = file_names(model, live)
    try:
        with safe_open(folder / ADAPTER_WEIGHTS_FILE, framework="pt") as stream:
            theirs = (stream.metadata() or {}).get(BASE_HASH)
            found = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118  # no dictionary
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{folder / ADAPTER_WEIGHTS_FILE} cannot be read ({error})", where=ADAPTER_OPTION, remedy=_ANOTHER
        ) from error
    if base_hash and theirs and theirs != base_hash:
        remedy = "take the model that it was trained on, or another adapter"
        raise ConfigError(f"the adapter in {folder} was trained on another model", where=ADAPTER_OPTION, remedy=remedy)
    for name in sorted(found.keys() ^ names.keys()):
        side = "the adapter has no" if name in names else "the recipe adapts no"
        layer = name.removeprefix(PREFIX)
        raise ConfigError(
            f"{side} {layer}", where=ADAPTER_OPTION, remedy="set targets and modules_to_save to what it has"
        )
    for name, parameter in names.items():
        if found[name].shape != parameter.shape:
            shapes = f"{tuple(found[name].shape)}, this model needs {tuple(parameter.shape)}"
            raise ConfigError(
                f"{name.removeprefix(PREFIX)} of the adapter has the shape {shapes}", where=ADAPTER_OPTION
            )
        if not found[name].isfinite().all():
            message = f"{folder / ADAPTER_WEIGHTS_FILE} holds what is no number in {name.removeprefix(PREFIX)}"
            raise ConfigError(message, where=ADAPTER_OPTION, remedy=_ANOTHER)
        parameter.copy_(found[name])
