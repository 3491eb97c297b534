"""Which weights of a model a method changes: by group, name or pattern, from the model's structure alone."""

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
"""The linear layers of the decoder blocks; experts and routers only where they are named."""

_KINDS: tuple[tuple[TargetGroup, re.Pattern[str]], ...] = (
    ("router", re.compile(r"router|topk|^gate$", re.IGNORECASE)),
    ("experts", re.compile(r"experts?", re.IGNORECASE)),
    ("attention", re.compile(r"attention|attn|mamba|deltanet", re.IGNORECASE)),
)


@dataclass(frozen=True)
class WeightMatrix:
    """A weight of two dimensions, or of three: one matrix for each expert.

    Attributes:
        module: Dotted name of the module that holds it.
        parameter: Its name there.
        group: What it does in its block; ``outside`` for embeddings and output layers.
        shape: As it is stored.
        is_transposed: Whether it is stored as (in, out), as GPT-2's layers are.
        others: Further names of the same weight, in the model's state: those of layers that share it.
    """

    module: str
    parameter: str
    group: TargetGroup
    shape: tuple[int, ...]
    is_transposed: bool
    tied_names: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """How a person names it: the layer, or the parameter of a module that is none."""
        return self.module if self.parameter == "weight" else f"{self.module}.{self.parameter}"

    @property
    def full_name(self) -> str:
        """Its name in the model's state."""
        return f"{self.module}.{self.parameter}"


def weight_matrices(model: PreTrainedModel) -> list[WeightMatrix]:
    """Return every matrix of a model once, in the model's order; tied ones under their first name."""
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
    """Yield names and classes of the modules on the way from a block to one of its parts, the part first."""
    parts = path.split(".") if path else []
    for length in range(len(parts), 0, -1):
        yield parts[length - 1]
        yield type(block.get_submodule(".".join(parts[:length]))).__name__


def _group(words: tuple[str, ...] | None, num_axes: int) -> TargetGroup:
    if words is None:
        return "outside"
    if num_axes == 3:
        return "experts"
    for word in words:
        for group, pattern in _KINDS:
            if pattern.search(word):
                return group
    return "mlp"


def resolve_targets(model: PreTrainedModel, targets: str | Sequence[str]) -> list[WeightMatrix]:
    """Return the matrices that targets name, in the model's order.

    Args:
        model: The model, with or without memory.
        targets: ``all-linear``, groups (``attention``, ``mlp``, ``experts``, ``router``), names of layers or ends of
            such names (``q_proj``, ``self_attn.q_proj``), or regular expressions for whole names.

    Raises:
        ConfigError: An entry, or none at all, matches nothing (the model's own names are listed), is no pattern, or
            names again what another one has named.
    """
    everything = weight_matrices(model)
    chosen: dict[str, str] = {}
    if not targets:
        remedy = f"leave the option out, or name some; the model has {describe_matrices(everything)}"
        raise ConfigError("names nothing", where="model.init_args.targets", remedy=remedy)
    for entry in [targets] if isinstance(targets, str) else targets:
        found = [matrix.full_name for matrix in everything if _is_meant(entry, matrix)]
        if not found:
            raise ConfigError(
                f"{entry!r} matches no weight of this model",
                where="model.init_args.targets",
                remedy=f"it has {describe_matrices(everything)}",
            )
        twice = next((name for name in found if name in chosen), None)
        if twice is not None:
            raise ConfigError(
                f"{chosen[twice]!r} and {entry!r} both name {twice}",
                where="model.init_args.targets",
                remedy="let each weight be named once",
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
            f"{entry!r} is no regular expression: {error}",
            where="model.init_args.targets",
            remedy="write a name, a group or a pattern for whole names",
        ) from error


def reject_tied_weights(found: Iterable[WeightMatrix], remedy: str) -> None:
    """Refuse weights that layers share: what is put beside one of these would change the others too, or not.

    Args:
        found: What is to be changed.
        remedy: What to do instead.

    Raises:
        ConfigError: One is shared.
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
