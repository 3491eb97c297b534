"""Builds a miniature of a model: the same class and configuration with small sizes, to run proofs on it.

Only sizes change: each flag, each kind of layer, each cap, sink and scale stays. Windows, chunks and other lengths
become shorter than the documents of a proof, so that they have an effect. A check compares the kinds of layers with
those of the full model, which is built on the meta device for this.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from lightning_hub.ops.small_sizes import HEAD_DIM, REACH, VOCABULARY, Config, small_size

LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
    "num_decoder_layers", "num_encoder_layers", "num_blocks", "depth", "num_layers_per_stack",
)  # fmt: skip
"""Names of the number of layers in configurations."""


class NoMiniatureError(RuntimeError):
    """A model cannot be built small, or not with every kind of layer that it has."""


def small_config(kind: type[PreTrainedModel], config: PretrainedConfig) -> PretrainedConfig:
    """Return a configuration with small sizes, whose model has every kind of module of the full model.

    Args:
        kind: The class of the model.
        config: The configuration of the model; not changed.

    Raises:
        NoMiniatureError: There is no such configuration.
    """
    try:
        full = kinds_of(_without_memory(kind, config))
        layers = max([*_counts(config.to_dict()), 2])
    except Exception as error:  # configurations have their own checks: any error is possible
        raise NoMiniatureError(_reason(error)) from error
    failure: Exception | None = None
    for count in _growing(layers):
        try:
            small = shrink(config, count)
            if full <= (found := kinds_of(_without_memory(kind, small))):
                return small
            missing = ", ".join(sorted({name for _, name, _ in full - found}))
            failure = NotImplementedError(f"these kinds of modules are missing: {missing}")
        except Exception as error:
            failure = error
    assert failure is not None, "some number of layers was tried"
    raise NoMiniatureError(_reason(failure)) from failure


def build(kind: type[PreTrainedModel], small: PretrainedConfig, attn_implementation: str) -> PreTrainedModel:
    """Return a model with large random weights, float32; it seeds the random generator of torch.

    Args:
        kind: The class of the model.
        small: Its configuration; not changed.
        attn_implementation: A name that is registered with transformers.
    """
    config = deepcopy(small)
    config.dtype = torch.float32
    config._attn_implementation = attn_implementation
    torch.manual_seed(0)
    model = kind(config)
    enlarge(model)
    return model


def rope_limit(config: Config) -> int | None:
    """Return the document length above which the rotary embeddings of the whole forward change; None for no limit."""
    limits = [limit for value in config.values() if isinstance(value, dict) and (limit := rope_limit(value))]
    for rope in _ropes(config.get("rope_parameters")):
        if rope.get("rope_type") == "dynamic":
            limits.append((config.get("max_position_embeddings") or 1) - 1)  # up to this length they do not change
        if rope.get("rope_type") == "longrope":
            names = ("original_max_position_embeddings", "max_position_embeddings")
            limits.append(
                next((found for source in (rope, config) for name in names if (found := source.get(name))), 0)
            )
    return min(limits, default=None)


def _ropes(parameters: object) -> list[Config]:
    """Return all rotary parameters: some models have one set for each type of layer."""
    if not isinstance(parameters, dict):
        return []
    inner = [value for value in parameters.values() if isinstance(value, dict)]
    return [parameters, *inner]


def without_limit(small: PretrainedConfig) -> PretrainedConfig:
    """Return a configuration whose rotary embeddings do not change for the documents of a proof."""

    def lengthened(config: Config) -> Config:
        return {
            name: lengthened(value)
            if isinstance(value, dict)
            else 64
            if name == "original_max_position_embeddings" and value
            else 128
            if name == "max_position_embeddings"
            else value
            for name, value in config.items()
        }

    return type(small).from_dict(lengthened(_plain(small)))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _growing(layers: int) -> list[int]:
    counts = [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    return [count for count in counts if count < layers] + [layers]


def _without_memory(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    plain = type(config).from_dict(_plain(config))
    plain._attn_implementation = "eager"
    with torch.device("meta"), no_init_weights():
        return kind(plain)


def _plain(config: PretrainedConfig) -> Config:
    """Return the configuration without the entries about the storage of weights (dtype, quantization)."""
    return {name: value for name, value in config.to_dict().items() if name not in ("quantization_config", "dtype")}


def kinds_of(model: nn.Module) -> set[tuple[str, str, tuple[tuple[str, object], ...]]]:
    """Return the kinds of modules: path with ``*`` for numbers, class, and flags (None, bool or str attributes)."""
    found: set[tuple[str, str, tuple[tuple[str, object], ...]]] = set()
    for path, module in model.named_modules():
        flags = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
        plain = tuple(
            sorted((name, value) for name, value in flags.items() if value is None or isinstance(value, (bool, str)))
        )
        found.add((re.sub(r"\d+", "*", path), type(module).__qualname__, plain))
    return found


def shrink(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """Return a configuration of the same class with small sizes.

    Args:
        config: The full configuration; not changed.
        layers: The largest number of layers of each stack.
    """
    return type(config).from_dict(_shrunk(_plain(config), layers))


def _counts(config: Config) -> list[int]:
    """Return the numbers of layers of a configuration and of its inner configurations."""
    own = [config[name] for name in LAYERS if isinstance(config.get(name), int)]
    return own + [count for value in config.values() if isinstance(value, dict) for count in _counts(value)]


def _shrunk(config: Config, layers: int) -> Config:
    counts = {config[name] for name in LAYERS if isinstance(config.get(name), int)}
    depth = max(counts, default=0)
    kept = _representatives(config, depth, layers)
    small: Config = {}
    for name, value in config.items():
        if name in LAYERS and isinstance(value, int):
            small[name] = len(kept) if value == depth else max(1, value * len(kept) // depth)
        elif name == "per_layer_config" and isinstance(value, dict):
            small[name] = {
                kept.index(int(index)): _shrunk(own, layers) for index, own in value.items() if int(index) in kept
            }
        elif isinstance(value, dict) and name not in ("id2label", "label2id"):
            small[name] = _rope(value, config) if "rope" in name else _shrunk(value, layers)
        elif isinstance(value, (list, tuple)) and depth:
            small[name] = _of_layers(name, value, depth, kept, config)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            small[name] = _number(name, value, config, depth, len(kept))
        else:
            small[name] = value
    return small


def _representatives(config: Config, depth: int, layers: int) -> list[int]:
    """Return the indices of the kept layers: the first of each kind, by the per-layer lists of the configuration."""
    found = {name: value for name, value in config.items() if isinstance(value, (list, tuple))}
    places = [value for name, value in found.items() if _are_layer_indices(name, value)]
    lists = [value for name, value in found.items() if len(value) == depth > 1 and not _are_layer_indices(name, value)]
    seen: dict[str, int] = {}
    own = config.get("per_layer_config") or {}
    for index in range(depth):
        said = [own.get(index, own.get(str(index))), *(value[index] for value in lists)]
        seen.setdefault(str([said, *(index in value for value in places)]), index)
    firsts = sorted(seen.values())
    others = [index for index in range(depth) if index not in firsts]
    return sorted(firsts + others[: max(0, layers - len(firsts))]) if depth else []


def _are_layer_indices(name: str, values: Sequence[Any]) -> bool:
    """Return whether a list contains layer indices, in ascending order."""
    are_ints = all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    named = re.search(r"(ids|idxs|indexes|indices|layers)$", name)
    return bool(named) and are_ints and all(left < right for left, right in pairwise(values))


def _of_layers(name: str, values: Sequence[Any], depth: int, kept: list[int], config: Config) -> list[Any]:
    """Shrink a list that has one entry for each layer, or that contains layer indices."""
    if _are_layer_indices(name, values):
        return [kept.index(value) for value in values if value in kept]
    if len(values) == depth > 1:
        return [_entry(name, values[index], config) for index in kept]
    return list(values)


def _entry(name: str, value: Any, config: Config) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return _number(name.removesuffix("_per_layer"), value, config, 0, 0)
    return value


def _number(name: str, value: float, config: Config, depth: int, kept: int) -> float:
    if isinstance(value, float):
        return 0.0 if re.search("drop|jitter", name) else value
    if name.endswith("token_id") or name.endswith("token_index"):
        return value if value < VOCABULARY else VOCABULARY - 1 - value % 8
    if depth and re.search(r"num_kv_shared_layers", name):
        return min(kept - 1, max(1, value * kept // depth)) if value else 0
    if depth and re.search(r"layer_(start|end)_index|max_window_layers", name):
        return min(value, kept - 1)
    return small_size(name, value, config) if value > 1 else value


def _rope(rope: Config, config: Config) -> Config:
    """Shorten the lengths in rotary parameters, so that documents of a proof are longer."""
    small: Config = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            small[name] = _rope(value, config)
        elif name == "original_max_position_embeddings":
            small[name] = REACH * 2
        elif name in ("short_factor", "long_factor") and isinstance(value, (list, tuple)):
            head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
            count = len(value) * HEAD_DIM // head_dim  # one for each pair of rotated dims of a head
            small[name] = [value[place * len(value) // count] for place in range(count)]
        else:
            small[name] = value
    return small


@torch.no_grad()
def enlarge(model: nn.Module) -> None:
    """Set weights so large that each layer changes the result, as in a trained model.

    Matrices are random with standard deviation ``inputs ** -0.5``. Weights with a constant initial value (norms,
    biases, sinks, gates) get random noise added.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        spread, mean = parameter.float().std(correction=0), parameter.float().mean().abs()
        if not torch.isfinite(parameter).all():
            parameter.copy_(noise * 0.1)
        elif parameter.ndim < 2 or mean > spread:
            parameter.add_(noise * 0.1)
        else:
            wanted = parameter.shape[-1] ** -0.5
            if spread < wanted:
                parameter.copy_(noise * wanted)
