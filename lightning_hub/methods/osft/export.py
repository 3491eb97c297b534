"""The export of OSFT: merged weights, the exact deltas, and a report of what rounding does to the deltas."""

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
"""The exact deltas, float32: ``<weight>.left`` times ``<weight>.right``; only ``left`` if everything trained. Parts of
a fused weight are ``<weight>.0`` and so on, in the order of their outputs."""

RESULT_FINGERPRINTS = "left"
"""The metadata key for fingerprints of the merged weights; the next task compares its model with them."""


@dataclass(frozen=True)
class MergedWeight:
    """One weight and its delta, as full tensors.

    Attributes:
        name: The weight's own name.
        group: Its kind within its block.
        weight: ``W0``.
        change: The dense delta, float32, the shape of the weight.
        factors: The factors of the delta, by the name of the weight or of its parts.
        leaks: Returns for a change of the weight its largest share in protected columns, and in protected rows.
    """

    name: str
    group: TargetGroup
    weight: Tensor
    change: Tensor
    factors: dict[str, Factors]
    leaks: Callable[[Tensor], tuple[float, float]]

    def apply(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the merged weight, rounded once to ``dtype`` (None: the dtype of the weight).

        Elements with a delta of 0 are bit-identical to the weight.
        """
        dtype = dtype or self.weight.dtype
        return torch.where(self.change == 0, self.weight.to(dtype), (self.weight + self.change).to(dtype))


@torch.no_grad()
def merge_delta(weights: Iterable[ParametrizedWeight], state: Mapping[str, Tensor]) -> Iterator[MergedWeight]:
    """Yield each weight that has a delta, from full tensors.

    Args:
        weights: The parametrized weights of a model.
        state: The full state dict of the model; the tensors of the live deltas may be sharded.
    """
    for parametrized in weights:
        prefix = f"{parametrized.matrix.module}.parametrizations.{parametrized.matrix.parameter}"
        tensors = {f"inner.{name}": state[f"{prefix}.0.{name}"] for name, _ in parametrized.delta.named_parameters()}
        tensors |= {f"inner.{name}": buffer.cpu() for name, buffer in parametrized.delta.named_buffers()}
        weight = state[f"{prefix}.original"]
        factors = torch.func.functional_call(_Factors(parametrized.delta), tensors, (weight,))
        leaks = _with_delta(_Leaks(parametrized.delta), tensors, weight)
        change = parametrized.delta.join([product(pair) for pair in factors], parametrized.delta.output_dim)
        names = [name for name, *_ in parametrized.pieces(weight)]
        yield MergedWeight(
            parametrized.matrix.full_name,
            parametrized.matrix.group,
            weight,
            change,
            dict(zip(names, factors, strict=True)),
            leaks,
        )


def _with_delta(leaks: _Leaks, tensors: dict[str, Tensor], weight: Tensor) -> Callable[[Tensor], tuple[float, float]]:
    return lambda change: torch.func.functional_call(leaks, tensors, (weight, change))


class _Factors(nn.Module):
    """Computes the factors of a delta; `functional_call` replaces its tensors."""

    def __init__(self, delta: WeightDelta) -> None:
        super().__init__()
        self.inner = delta

    def forward(self, weight: Tensor) -> list[Factors]:
        return [piece.factors(part) for _, piece, part in self.inner.pieces(weight)]


class _Leaks(nn.Module):
    """Computes how much of a change leaks into protected directions; `functional_call` replaces its tensors."""

    def __init__(self, delta: WeightDelta) -> None:
        super().__init__()
        self.inner = delta

    def forward(self, weight: Tensor, change: Tensor) -> tuple[float, float]:
        return self.inner.leaks(weight, change)


def merged_state(
    weights: Iterable[ParametrizedWeight], state: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return the merged weights of a model, under the names of the model without deltas; cast if ``dtype`` is given."""
    changed = {found.name: found.apply(dtype) for found in merge_delta(weights, state)}
    named = {name: state[key] for key in state if (name := merged_name(key)) is not None}
    return {name: changed.get(name, tensor).to(dtype or tensor.dtype) for name, tensor in named.items()}


def write_deltas(path: Path, found: Iterable[MergedWeight], settings: Mapping[str, object]) -> None:
    """Write the exact deltas, with a hash of each weight ``W0`` and a fingerprint of each merged weight.

    Args:
        path: The file.
        found: The weights and deltas.
        settings: The settings of the method, for readers of the file.
    """
    tensors: dict[str, Tensor] = {}
    hashes: dict[str, str] = {}
    fingerprints: dict[str, str] = {}
    for one in found:
        for name, (first, right) in one.factors.items():
            tensors[f"{name}.left"] = first.contiguous()
            if right is not None:
                tensors[f"{name}.right"] = right.contiguous()
        bits = one.weight.contiguous().view(torch.uint8).numpy().tobytes()
        hashes[one.name] = hashlib.sha256(bits).hexdigest()
        fingerprints[one.name] = tensor_fingerprint(one.apply()).hex()
    about = json.dumps({"settings": dict(settings), "weights": hashes, RESULT_FINGERPRINTS: fingerprints}, default=str)
    save_file(tensors, path, metadata={"format": "pt", "osft": about})


def describe_sizes(found: Iterable[MergedWeight]) -> str:
    """Return one line: the Frobenius norm of the deltas relative to that of their weights, for each group."""
    squares: dict[TargetGroup, list[float]] = {}
    for one in found:
        sums = squares.setdefault(one.group, [0.0, 0.0])
        for index, tensor in enumerate((one.change, one.weight)):
            sums[index] += float(tensor.double().square().sum())
    shares = {group: (change / weight) ** 0.5 if weight else 0.0 for group, (change, weight) in squares.items()}
    listed = ", ".join(f"{share:.2%} ({group})" for group, share in shares.items())
    return f"changed by {listed}" if listed else "no target has a direction that trains"


@dataclass
class LeakageReport(CastError):
    """The error of deltas after a cast, and how much of them is then in protected directions.

    Attributes:
        leaks: For each weight, the share of the delta after the cast in protected columns or rows; the larger one.
    """

    leaks: dict[str, float] = field(default_factory=dict)

    def count(self, one: MergedWeight) -> None:
        """Add one weight."""
        left = self.add(one.weight, one.change, one.apply(self.dtype))
        self.leaks[one.name] = max(one.leaks(left)) if one.change.any() else 0.0

    def describe(self) -> str:
        """Return one line of text."""
        if not self.leaks:
            return super().describe()
        worst = max(self.leaks, key=lambda name: self.leaks[name])
        return (
            f"{super().describe()}; up to {self.leaks[worst]:.1%} of it is in protected directions ({worst}); "
            f"the exact delta is in {DELTA_FILE}"
        )
