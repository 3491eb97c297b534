"""What earlier tasks have learnt, as directions that a further one leaves alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the files, for what is made with them; they are as large as models, so each is read once."""
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
    left = _move(found.u, found.protected, columns.to(found.u), count)
    right = _move(found.v.mT, found.protected, rows.mT.to(found.v), count)
    values = found.values.clone()
    return replace(found, u=left, v=right.mT, values=values, protected=found.protected + count)


def _move(basis: Tensor, protected: int, span: Tensor, count: int) -> Tensor:
    """Return orthonormal columns, the protected ones and a span first, then what is left of the others."""
    high, low = basis[:, :protected], basis[:, protected:]
    taken, _ = torch.linalg.qr(span)
    left_over, _, _ = torch.linalg.svd(low.mT @ taken, full_matrices=True)
    first, _ = torch.linalg.qr(torch.cat([high, taken], 1))
    return torch.cat([first, low @ left_over[:, count:]], 1)
