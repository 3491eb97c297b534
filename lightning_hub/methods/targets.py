"""Finds the weights that a method adapts, by group, name or pattern, from the structure of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_hub.errors import ConfigError
from lightning_hub.parallel.fsdp import decoder_blocks

TargetGroup = Literal["attention", "mlp", "experts", "router", "outside"]

GROUPS: tuple[TargetGroup, ...] = ("attention", "mlp", "experts", "router")
"""Words that name all matrices of one kind within the decoder blocks."""

ALL_LINEAR = "all-linear"
"""Names the linear layers of the decoder blocks, without experts and routers."""

_KINDS: tuple[tuple[TargetGroup, re.Pattern[str]], ...] = (
    ("router", re.compile(r"router|topk|^gate$", re.IGNORECASE)),
    ("experts", re.compile(r"experts?", re.IGNORECASE)),
    ("attention", re.compile(r"attention|attn|mamba|deltanet", re.IGNORECASE)),
)


@dataclass(frozen=True)
class WeightMatrix:
    """A weight with two dims, or with three: one matrix for each expert.

    Attributes:
        module: Dotted name of the module that has it.
        parameter: Its name there.
        group: Its kind within its block; ``outside`` for embeddings and output layers.
        shape: The shape as it is stored.
        is_transposed: Whether it is stored as (in, out), as GPT-2's layers are.
        tied_names: Further names of the same weight in the state dict: those of layers that share it.
    """

    module: str
    parameter: str
    group: TargetGroup
    shape: tuple[int, ...]
    is_transposed: bool
    tied_names: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its name in options and messages: that of the layer, or of the parameter if it is not called ``weight``."""
        return self.module if self.parameter == "weight" else f"{self.module}.{self.parameter}"

    @property
    def full_name(self) -> str:
        """Its name in the state dict."""
        return f"{self.module}.{self.parameter}"


def weight_matrices(model: PreTrainedModel) -> list[WeightMatrix]:
    """Return every matrix of a model once, in the order of the model; tied ones under their first name."""
    names = {module: name for name, module in model.named_modules()}
    inside: dict[int, tuple[str, ...]] = {}
    for block in decoder_blocks(model):
        for path, module in block.named_modules():
            inside[id(module)] = tuple(_words(block, path))
    known: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        known.setdefault(id(tensor), []).append(name)
    found, seen = [], set()
    for module, name in names.items():
        for parameter, tensor in module.named_parameters(recurse=False):
            if tensor.ndim in (2, 3) and not parameter.endswith("bias") and id(tensor) not in seen:
                seen.add(id(tensor))
                group = _group(inside.get(id(module)), tensor.ndim)
                shape = tuple(tensor.shape)
                others = tuple(other for other in known[id(tensor)] if other != f"{name}.{parameter}")
                found.append(WeightMatrix(name, parameter, group, shape, isinstance(module, Conv1D), others))
    return found


def _words(block: nn.Module, path: str) -> Iterator[str]:
    """Yield names and classes of the modules from one of a block's modules up to the block, inner ones first."""
    parts = path.split(".") if path else []
    for length in range(len(parts), 0, -1):
        yield parts[length - 1]
        yield type(block.get_submodule(".".join(parts[:length]))).__name__


def _group(words: tuple[str, ...] | None, num_dims: int) -> TargetGroup:
    if words is None:
        return "outside"
    if num_dims == 3:
        return "experts"
    for word in words:
        for group, pattern in _KINDS:
            if pattern.search(word):
                return group
    return "mlp"


def resolve_targets(model: PreTrainedModel, targets: str | Sequence[str]) -> list[WeightMatrix]:
    """Return the matrices that targets name, in the model's order.

    Args:
        model: The model; it may be on the meta device.
        targets: ``all-linear``, groups (``attention``, ``mlp``, ``experts``, ``router``), names of layers or ends of
            such names (``q_proj``, ``self_attn.q_proj``), or regular expressions for whole names.

    Raises:
        ConfigError: There is no entry, or one matches nothing (the message lists the names of the model), is not a
            regular expression, or names a weight that another entry names.
    """
    everything = weight_matrices(model)
    chosen: dict[str, str] = {}
    if not targets:
        remedy = f"remove the option, or name some weights; the model has {describe_matrices(everything)}"
        raise ConfigError("no weights are named", where="model.init_args.targets", remedy=remedy)
    for entry in [targets] if isinstance(targets, str) else targets:
        found = [matrix.full_name for matrix in everything if _is_meant(entry, matrix)]
        if not found:
            raise ConfigError(
                f"{entry!r} matches no weight of this model",
                where="model.init_args.targets",
                remedy=f"name some of these: {describe_matrices(everything)}",
            )
        twice = next((name for name in found if name in chosen), None)
        if twice is not None:
            raise ConfigError(
                f"{chosen[twice]!r} and {entry!r} both name {twice}",
                where="model.init_args.targets",
                remedy="name each weight once",
            )
        chosen |= dict.fromkeys(found, entry)
    return [matrix for matrix in everything if matrix.full_name in chosen]


def _is_meant(entry: str, matrix: WeightMatrix) -> bool:
    if entry == ALL_LINEAR:
        return matrix.group in ("attention", "mlp") and len(matrix.shape) == 2
    if entry in GROUPS:
        return matrix.group == entry
    names = [matrix.name, *(other.removesuffix(".weight") for other in matrix.tied_names)]
    if any(name == entry or name.endswith(f".{entry}") for name in names):
        return True
    try:
        return any(re.fullmatch(entry, name) for name in names)
    except re.error as error:
        raise ConfigError(
            f"{entry!r} is not a regular expression: {error}",
            where="model.init_args.targets",
            remedy="write a name, a group or a pattern for whole names",
        ) from error


def reject_tied_weights(found: Iterable[WeightMatrix], remedy: str) -> None:
    """Reject weights that several layers share: they cannot be adapted one by one.

    Args:
        found: The weights to adapt.
        remedy: What to do instead.

    Raises:
        ConfigError: One of them is shared.
    """
    for matrix in found:
        if matrix.tied_names:
            others = " and ".join(name.removesuffix(".weight") for name in matrix.tied_names)
            message = f"{matrix.name} shares its weight with {others}: neither can change alone"
            raise ConfigError(message, where="model.init_args.targets", remedy=remedy)


def describe_matrices(listed: Iterable[WeightMatrix]) -> str:
    """Return the last names of matrices by group: ``attention: k_proj, q_proj; mlp: up_proj``."""
    groups: dict[str, dict[str, None]] = {}
    for matrix in listed:
        groups.setdefault(matrix.group, {})[matrix.name.rpartition(".")[2]] = None
    return "; ".join(f"{group}: {', '.join(names)}" for group, names in groups.items())
