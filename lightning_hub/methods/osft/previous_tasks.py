"""What earlier tasks have learnt, as directions that a further one leaves alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_hub.errors import ConfigError
from lightning_hub.methods.fingerprint import tensor_fingerprint
from lightning_hub.methods.osft.export import DELTA_FILE, RESULT_FINGERPRINTS
from lightning_hub.methods.osft.subspace import SubspaceSplit

_PLACE = "model.init_args.previous"

_OTHER = "name exports of runs that began with this model"

NEW = 1e-8
"""How far a direction must lie outside of what is protected to count as another one."""

Spans: TypeAlias = tuple[Tensor, Tensor]
"""What the columns of changes span, and what their rows span."""


@dataclass(frozen=True)
class PreviousTasks:
    """The exact changes that earlier runs have left.

    Attributes:
        paths: Their files, oldest first.
    """

    paths: tuple[Path, ...] = ()

    @classmethod
    def of(cls, given: Sequence[str]) -> PreviousTasks:
        """Return what lies at paths: files of exact changes, or exports that hold one.

        Raises:
            ConfigError: There is none.
        """
        named = (Path(path).expanduser() for path in given)
        paths = tuple(path / DELTA_FILE if path.is_dir() else path for path in named)
        for place, path in enumerate(paths):
            if path.resolve() in (other.resolve() for other in paths[:place]):
                raise ConfigError(f"{path} is named twice", where=_PLACE, remedy="name each export once")
            try:
                with safe_open(path, framework="pt") as file:
                    known = "osft" in (file.metadata() or {})
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{path} cannot be read ({error})", where=_PLACE, remedy="name an export") from error
            if not known:
                raise ConfigError(f"{path} holds no exact changes of ours", where=_PLACE, remedy="name an export")
        return cls(paths)

    def rank(self, name: str, shape: Sequence[int] | None = None) -> int:
        """Return how many directions of a weight, or of a part of one, the earlier changes take on each side.

        Args:
            name: Of the weight, or of the part.
            shape: What it must have, if anything.

        Raises:
            ConfigError: They are of a weight of another shape.
        """
        taken = 0
        for path in self.paths:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                if f"{name}.left" not in names:
                    continue
                theirs = left = file.get_slice(f"{name}.left").get_shape()
                if f"{name}.right" in names:
                    theirs = [*left[:-1], file.get_slice(f"{name}.right").get_shape()[-1]]
                if shape is not None and theirs != [*shape]:
                    shapes = f"{' x '.join(map(str, theirs))}, this model's is {' x '.join(map(str, shape))}"
                    raise ConfigError(
                        f"{path} holds a change of {name} of the shape {shapes}", where=_PLACE, remedy=_OTHER
                    )
                taken += min(left[-2:])
        return taken

    def check(self, model: nn.Module) -> None:
        """Refuse changes of weights that a model has not.

        Raises:
            ConfigError: There is one.
        """
        known = {name for name, _ in model.named_parameters()}
        for path in self.paths:
            with safe_open(path, framework="pt") as file:
                changed = {key.rpartition(".")[0] for key in file.keys()}  # noqa: SIM118  # no dictionary
            strange = sorted(name for name in changed if not {name, name.rpartition(".")[0]} & known)
            if strange:
                message = f"{path} holds a change of {strange[0]}, which this model has not"
                raise ConfigError(message, where=_PLACE, remedy=_OTHER)

    def mismatch_warnings(self, model: nn.Module) -> list[str]:
        """Return a line for a person if the weights of a model, as it was read, are not what the last file has left."""
        if not self.paths:
            return []
        with safe_open(self.paths[-1], framework="pt") as file:
            left = json.loads(file.metadata()["osft"]).get(RESULT_FINGERPRINTS, {})
        others = [
            name for name, numbers in left.items() if tensor_fingerprint(model.get_parameter(name)).hex() != numbers
        ]
        if not others:
            return []
        return [
            f"previous: {len(others)} of {len(left)} weights are not what {self.paths[-1]} has left, as "
            f"{others[0]}: is it of this model, and the last?"
        ]

    def spans(self, name: str) -> Spans | None:
        """Return the columns and the rows that the earlier changes of a weight span, side by side, in float64."""
        lefts, rights = [], []
        for path in self.paths:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                if f"{name}.left" in names:
                    left = file.get_tensor(f"{name}.left").double()
                    right = file.get_tensor(f"{name}.right").double() if f"{name}.right" in names else left
                    if not (left.isfinite().all() and right.isfinite().all()):
                        message = f"{path} holds what is no number in the change of {name}"
                        raise ConfigError(message, where=_PLACE, remedy="the file is damaged: export that run again")
                    lefts.append(left)
                    rights.append(right)
        return (torch.cat(lefts, -1), torch.cat(rights, -2)) if lefts else None

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the files, for what is made with them; they are as large as models, so each is read once."""
        found = []
        for path in self.paths:
            with path.open("rb") as file:
                found.append(hashlib.file_digest(file, "sha256").hexdigest()[:16])
        return " ".join(found)


def protect(found: SubspaceSplit, columns: Tensor, rows: Tensor) -> SubspaceSplit:
    """Return a split that also protects what earlier changes span; as many directions are no longer trained.

    Args:
        found: The split of the weight.
        columns: What the columns of earlier changes span, shape ``(out, t)``.
        rows: What their rows span, shape ``(t, in)``.
    """
    count = columns.shape[1]
    left = _rotate_basis(found.u, found.protected, columns.to(found.u))
    right = _rotate_basis(found.v.mT, found.protected, rows.mT.to(found.v))
    return replace(found, u=left, v=right.mT, protected=found.protected + count)


def _rotate_basis(basis: Tensor, protected: int, span: Tensor) -> Tensor:
    """Return orthonormal columns: the protected ones, as many more with which they hold a span, what is left of others.

    Args:
        basis: Orthonormal columns, shape ``(size, R)``.
        protected: How many of them, the first, are protected already.
        span: Shape ``(size, t)``; it need not lie within the basis, nor apart from what is protected.
    """
    high, low = basis[:, :protected], basis[:, protected:]
    count = span.shape[1]
    taken, _ = torch.linalg.qr(span)
    turned, _, _ = torch.linalg.svd(low.mT @ taken, full_matrices=True)
    met, others = low @ turned[:, :count], low @ turned[:, count:]
    found, sizes, _ = torch.linalg.svd(taken - high @ (high.mT @ taken), full_matrices=False)
    new = found[:, sizes > NEW]
    # Where some of the span is protected already, directions that no longer train make up the number.
    filling, _, _ = torch.linalg.svd(met - new @ (new.mT @ met), full_matrices=False)
    return torch.cat([high, new, filling[:, : count - new.shape[1]], others], 1)
