"""What OSFT leaves behind: the weights with their changes, the exact changes, and what rounding does to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_hub.methods.cast_error import CastError
from lightning_hub.methods.fingerprint import tensor_fingerprint
from lightning_hub.methods.osft.inject import ParametrizedWeight, merged_name
from lightning_hub.methods.osft.weight_delta import Factors, WeightDelta, product
from lightning_hub.methods.targets import TargetGroup

DELTA_FILE = "osft_delta.safetensors"
"""The exact changes, float32: ``<weight>.left`` times ``<weight>.right``; only ``left`` where everything trained. Parts
of a fused weight are ``<weight>.0`` and so on, in the order of their outputs."""

RESULT_FINGERPRINTS = "left"
"""Where the file tells numbers of each weight with its change, by which a further task knows it."""


@dataclass(frozen=True)
class MergedWeight:
    """One weight and its change, whole.

    Attributes:
        name: The weight's own name.
        group: What it does in its block.
        weight: ``W0``.
        change: The change, float32.
        factors: What the change is the product of: by the name of the weight, or those of its parts.
        leaks: Returns the largest share of any change of it in protected columns, and in protected rows.
    """

    name: str
    group: TargetGroup
    weight: Tensor
    change: Tensor
    factors: dict[str, Factors]
    leaks: Callable[[Tensor], tuple[float, float]]

    def apply(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight with its change, rounded once: to a dtype, its own if None.

        Numbers that do not change keep their bits.
        """
        kept = dtype or self.weight.dtype
        return torch.where(self.change == 0, self.weight.to(kept), (self.weight + self.change).to(kept))


@torch.no_grad()
def merge_delta(sites: Iterable[ParametrizedWeight], state: Mapping[str, Tensor]) -> Iterator[MergedWeight]:
    """Yield each weight that has a change, from whole tensors.

    Args:
        sites: The changes of a model.
        state: The model's whole tensors by name; those of the changes lie on several ranks otherwise.
    """
    for site in sites:
        prefix = f"{site.matrix.module}.parametrizations.{site.matrix.parameter}"
        tensors = {f"inner.{name}": state[f"{prefix}.0.{name}"] for name, _ in site.change.named_parameters()}
        tensors |= {f"inner.{name}": kept.cpu() for name, kept in site.change.named_buffers()}
        weight = state[f"{prefix}.original"]
        factors = torch.func.functional_call(_Factors(site.change), tensors, (weight,))
        leaks = _with_delta(_Leaks(site.change), tensors, weight)
        change = site.change.join([product(pair) for pair in factors], site.change.axis)
        names = [name for name, *_ in site.pieces(weight)]
        yield MergedWeight(
            site.matrix.full_name, site.matrix.group, weight, change, dict(zip(names, factors, strict=True)), leaks
        )


def _with_delta(leaks: _Leaks, tensors: dict[str, Tensor], weight: Tensor) -> Callable[[Tensor], tuple[float, float]]:
    return lambda change: torch.func.functional_call(leaks, tensors, (weight, change))


class _Factors(nn.Module):
    """Computes the factors of a change from tensors that are handed to it."""

    def __init__(self, change: WeightDelta) -> None:
        super().__init__()
        self.inner = change

    def forward(self, weight: Tensor) -> list[Factors]:
        return [piece.factors(part) for _, piece, part in self.inner.pieces(weight)]


class _Leaks(nn.Module):
    """Says how much of a change leaks, from tensors that are handed to it."""

    def __init__(self, change: WeightDelta) -> None:
        super().__init__()
        self.inner = change

    def forward(self, weight: Tensor, change: Tensor) -> tuple[float, float]:
        return self.inner.leaks(weight, change)


def merged_state(
    sites: Iterable[ParametrizedWeight], state: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return a model's weights with their changes, under the names that they had before; in a dtype if one is given."""
    changed = {found.name: found.apply(dtype) for found in merge_delta(sites, state)}
    kept = {name: state[key] for key in state if (name := merged_name(key)) is not None}
    return {name: changed.get(name, tensor).to(dtype or tensor.dtype) for name, tensor in kept.items()}


def write_changes(path: Path, found: Iterable[MergedWeight], settings: Mapping[str, object]) -> None:
    """Write the exact changes, each with the hash of the weight that it belongs to, and numbers of what it has become.

    Args:
        path: The file.
        found: The changes.
        settings: Of the method, for whoever reads the file.
    """
    tensors: dict[str, Tensor] = {}
    hashes: dict[str, str] = {}
    left: dict[str, str] = {}
    for one in found:
        for name, (first, right) in one.factors.items():
            tensors[f"{name}.left"] = first.contiguous()
            if right is not None:
                tensors[f"{name}.right"] = right.contiguous()
        bits = one.weight.contiguous().view(torch.uint8).numpy().tobytes()
        hashes[one.name] = hashlib.sha256(bits).hexdigest()
        left[one.name] = tensor_fingerprint(one.apply()).hex()
    about = json.dumps({"settings": dict(settings), "weights": hashes, RESULT_FINGERPRINTS: left}, default=str)
    save_file(tensors, path, metadata={"format": "pt", "osft": about})


def describe_sizes(found: Iterable[MergedWeight]) -> str:
    """Return for a person how large the changes are beside their weights, for each group: Frobenius norms."""
    squares: dict[TargetGroup, list[float]] = {}
    for one in found:
        sums = squares.setdefault(one.group, [0.0, 0.0])
        for place, tensor in enumerate((one.change, one.weight)):
            sums[place] += float(tensor.double().square().sum())
    shares = {group: (change / weight) ** 0.5 if weight else 0.0 for group, (change, weight) in squares.items()}
    told = ", ".join(f"{share:.2%} ({group})" for group, share in shares.items())
    return f"changed by {told}" if told else "no target has a direction that trains"


@dataclass
class LeakageReport(CastError):
    """What a cast does to changes that have left protected directions alone.

    Attributes:
        leaks: For each weight, the larger share of the cast change in protected columns or rows.
    """

    leaks: dict[str, float] = field(default_factory=dict)

    def count(self, one: MergedWeight) -> None:
        """Count one weight."""
        left = self.add(one.weight, one.change, one.apply(self.dtype))
        self.leaks[one.name] = max(one.leaks(left)) if one.change.any() else 0.0

    def describe(self) -> str:
        """Return a line for a person."""
        if not self.leaks:
            return super().describe()
        worst = max(self.leaks, key=lambda name: self.leaks[name])
        return (
            f"{super().describe()}; up to {self.leaks[worst]:.1%} of it lies in protected directions ({worst}); "
            f"the exact one is {DELTA_FILE}"
        )
