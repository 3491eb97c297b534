"""What earlier tasks have learnt, as directions that a further one leaves alone."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_hub.errors import ConfigError
from lightning_hub.methods.osft.product import DELTA_FILE
from lightning_hub.methods.osft.split import Split

_PLACE = "model.init_args.previous"

NEW = 1e-8
"""How far a direction must lie outside of what is protected to count as another one."""

Spans: TypeAlias = tuple[Tensor, Tensor]
"""What the columns of changes span, and what their rows span."""


@dataclass(frozen=True)
class Earlier:
    """The exact changes that earlier runs have left.

    Attributes:
        paths: Their files, oldest first.
    """

    paths: tuple[Path, ...] = ()

    @classmethod
    def of(cls, given: Sequence[str]) -> Earlier:
        """Return what lies at paths: files of exact changes, or exports that hold one.

        Raises:
            ConfigError: There is none.
        """
        paths = tuple(path / DELTA_FILE if path.is_dir() else path for path in map(Path, given))
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    known = "osft" in (file.metadata() or {})
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{path} cannot be read ({error})", where=_PLACE, remedy="name an export") from error
            if not known:
                raise ConfigError(f"{path} holds no exact changes of ours", where=_PLACE, remedy="name an export")
        return cls(paths)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse changes of another model, which would protect nothing.

        Args:
            shapes: Of the model's matrices as they are stored, by their names.

        Raises:
            ConfigError: A change is of a weight that the model has not.
        """
        for path in self.paths:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                for name in sorted(key.removesuffix(".left") for key in names if key.endswith(".left")):
                    left, right = (f"{name}.left", f"{name}.right" if f"{name}.right" in names else f"{name}.left")
                    shape = (*file.get_slice(left).get_shape()[:-1], file.get_slice(right).get_shape()[-1])
                    whole, _, place = name.rpartition(".")
                    own = shapes.get(whole if place.isdigit() else name, ())
                    is_part = place.isdigit() and len(own) == len(shape) and all(map(operator.le, shape, own))
                    if shape != own and not is_part:
                        raise ConfigError(
                            f"{path} has a change of {name} ({' x '.join(map(str, shape))}), which this model has not",
                            where=_PLACE,
                            remedy="name exports of runs that began with this very model",
                        )

    def rank(self, name: str) -> int:
        """Return how many directions of a weight the earlier changes take on each side."""
        taken = 0
        for path in self.paths:
            with safe_open(path, framework="pt") as file:
                if f"{name}.left" in file.keys():  # noqa: SIM118  # no dictionary
                    taken += min(file.get_slice(f"{name}.left").get_shape()[-2:])
        return taken

    def spans(self, name: str) -> Spans | None:
        """Return the columns and the rows that the earlier changes of a weight span, side by side, in float64."""
        lefts, rights = [], []
        for path in self.paths:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                if f"{name}.left" in names:
                    left = file.get_tensor(f"{name}.left").double()
                    has_right = f"{name}.right" in names
                    lefts.append(left)
                    rights.append(file.get_tensor(f"{name}.right").double() if has_right else left)
        return (torch.cat(lefts, -1), torch.cat(rights, -2)) if lefts else None

    def fingerprint(self, name: str) -> str:
        """Return what bases of a weight are kept under: equal weights may have learnt other things."""
        return f"{self._hashes} {name}" if self.paths else ""

    @cached_property
    def _hashes(self) -> str:
        """What tells their files from others: each is read once, however many weights there are."""
        found = []
        for path in self.paths:
            with path.open("rb") as file:
                found.append(hashlib.file_digest(file, "sha256").hexdigest()[:16])
        return " ".join(found)


def protect(found: Split, columns: Tensor, rows: Tensor) -> Split:
    """Return a split that also protects what earlier changes span; as many directions are no longer trained.

    Args:
        found: The split of the weight.
        columns: What the columns of earlier changes span, shape ``(out, t)``.
        rows: What their rows span, shape ``(t, in)``.
    """
    count = columns.shape[1]
    left = _move(found.u, found.protected, columns.to(found.u))
    right = _move(found.v.mT, found.protected, rows.mT.to(found.v))
    return replace(found, u=left, v=right.mT, protected=found.protected + count)


def _move(basis: Tensor, protected: int, span: Tensor) -> Tensor:
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
