"""Subspaces used by previous tasks; they are added to the protected subspace of each weight."""

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

PREVIOUS_OPTION = "model.init_args.previous"

_OTHER = "name exports of runs that started from this model"

NEW = 1e-8
"""Singular value above which a direction is counted as outside the protected subspace."""

Spans: TypeAlias = tuple[Tensor, Tensor]
"""Columns that span those of the deltas, ``([experts,] out, t)``, and rows that span theirs, ``([experts,] t, in)``."""


@dataclass(frozen=True)
class PreviousTasks:
    """The exact deltas of previous runs.

    Attributes:
        paths: Their files, oldest first.
    """

    paths: tuple[Path, ...] = ()

    @classmethod
    def of(cls, given: Sequence[str]) -> PreviousTasks:
        """Open paths: files of exact deltas, or export folders with such a file.

        Raises:
            ConfigError: A path has no such file, or is given twice.
        """
        named = (Path(path).expanduser() for path in given)
        paths = tuple(path / DELTA_FILE if path.is_dir() else path for path in named)
        for index, path in enumerate(paths):
            if path.resolve() in (other.resolve() for other in paths[:index]):
                raise ConfigError(f"{path} is named twice", where=PREVIOUS_OPTION, remedy="name each export once")
            try:
                with safe_open(path, framework="pt") as file:
                    is_delta_file = "osft" in (file.metadata() or {})
            except (OSError, SafetensorError) as error:
                raise ConfigError(
                    f"{path} cannot be read ({error})", where=PREVIOUS_OPTION, remedy="name an export"
                ) from error
            if not is_delta_file:
                raise ConfigError(
                    f"{path} is not a file of exact deltas", where=PREVIOUS_OPTION, remedy="name an export of OSFT"
                )
        return cls(paths)

    def rank(self, name: str, shape: Sequence[int] | None = None) -> int:
        """Return how many directions of a weight, or of a part of one, the previous deltas use on each side.

        Args:
            name: Name of the weight, or of the part.
            shape: The shape that it must have; None for any.

        Raises:
            ConfigError: A delta has another shape.
        """
        num_reserved = 0
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
                        f"{path} has a delta of {name} with the shape {shapes}", where=PREVIOUS_OPTION, remedy=_OTHER
                    )
                num_reserved += min(left[-2:])
        return num_reserved

    def check(self, model: nn.Module) -> None:
        """Reject deltas of weights that a model does not have.

        Raises:
            ConfigError: There is such a delta.
        """
        known = {name for name, _ in model.named_parameters()}
        for path in self.paths:
            with safe_open(path, framework="pt") as file:
                changed = {key.rpartition(".")[0] for key in file.keys()}  # noqa: SIM118  # not a dict
            unknown = sorted(name for name in changed if not {name, name.rpartition(".")[0]} & known)
            if unknown:
                message = f"{path} has a delta of {unknown[0]}, which this model does not have"
                raise ConfigError(message, where=PREVIOUS_OPTION, remedy=_OTHER)

    def mismatch_warnings(self, model: nn.Module) -> list[str]:
        """Return a warning if the weights of the loaded model are not the merged weights of the last previous run."""
        if not self.paths:
            return []
        with safe_open(self.paths[-1], framework="pt") as file:
            expected = json.loads(file.metadata()["osft"]).get(RESULT_FINGERPRINTS, {})
        others = [
            name for name, numbers in expected.items() if tensor_fingerprint(model.get_parameter(name)).hex() != numbers
        ]
        if not others:
            return []
        return [
            f"previous: {len(others)} of {len(expected)} weights are not those that the run of {self.paths[-1]} "
            f"exported, for example {others[0]}: check that it is the last one, and that model is its export"
        ]

    def spans(self, name: str) -> Spans | None:
        """Return the spans of the previous deltas of a weight, concatenated, float64; None without deltas."""
        lefts, rights = [], []
        for path in self.paths:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                if f"{name}.left" in names:
                    left = file.get_tensor(f"{name}.left").double()
                    right = file.get_tensor(f"{name}.right").double() if f"{name}.right" in names else left
                    if not (left.isfinite().all() and right.isfinite().all()):
                        message = f"{path} has NaN or infinite numbers in the delta of {name}"
                        raise ConfigError(
                            message, where=PREVIOUS_OPTION, remedy="the file is damaged: export that run again"
                        )
                    lefts.append(left)
                    rights.append(right)
        return (torch.cat(lefts, -1), torch.cat(rights, -2)) if lefts else None

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the files, for cache keys and checkpoints; the files are large, so each is read once."""
        hashes = []
        for path in self.paths:
            with path.open("rb") as file:
                hashes.append(hashlib.file_digest(file, "sha256").hexdigest()[:16])
        return " ".join(hashes)


def protect(found: SubspaceSplit, columns: Tensor, rows: Tensor) -> SubspaceSplit:
    """Return a split that also protects the spans of previous deltas; it has ``t`` trainable directions fewer.

    Args:
        found: The split of the weight.
        columns: Columns that span those of the previous deltas, shape ``(out, t)``.
        rows: Rows that span theirs, shape ``(t, in)``.
    """
    count = columns.shape[1]
    left = _rotate_basis(found.u, found.protected, columns.to(found.u))
    right = _rotate_basis(found.v.mT, found.protected, rows.mT.to(found.v))
    return replace(found, u=left, v=right.mT, protected=found.protected + count)


def _rotate_basis(basis: Tensor, protected: int, span: Tensor) -> Tensor:
    """Return an orthonormal basis, shape ``(size, R)``, whose first ``protected + t`` columns contain ``span``.

    The first ``protected`` columns do not change.

    Args:
        basis: Orthonormal columns, shape ``(size, R)``.
        protected: How many of them, the first, are protected already.
        span: Shape ``(size, t)``; it may overlap the protected columns, and may be outside of the basis.
    """
    high, low = basis[:, :protected], basis[:, protected:]
    count = span.shape[1]
    directions, _ = torch.linalg.qr(span)
    rotation, _, _ = torch.linalg.svd(low.mT @ directions, full_matrices=True)
    touched, others = low @ rotation[:, :count], low @ rotation[:, count:]
    outside, sizes, _ = torch.linalg.svd(directions - high @ (high.mT @ directions), full_matrices=False)
    new = outside[:, sizes > NEW]
    # If a part of the span is protected already, other directions of `touched` are protected as well, so that the
    # number of protected directions grows by `count` in every case.
    filling, _, _ = torch.linalg.svd(touched - new @ (new.mT @ touched), full_matrices=False)
    return torch.cat([high, new, filling[:, : count - new.shape[1]], others], 1)
