"""The state that one process has for a checkpoint, and the shards of it that this process writes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_hub.checkpoints.tensors import Shard
from lightning_hub.errors import HubError
from lightning_hub.parallel.collectives import Ranks

Key: TypeAlias = tuple[str, str, tuple[int, ...]]
"""Identifies a shard on every rank: kind, name of the tensor, and offsets in the full tensor."""

MAX_NAMED_TENSORS = 3
"""How many tensors an error names."""


class NotFiniteError(HubError):
    """Weights or optimizer have NaN or infinite numbers, so a run could not resume from them."""

    kind = "nan"


@dataclass(frozen=True)
class Snapshot:
    """The state of a run on this rank.

    Attributes:
        step: Number of finished optimizer steps.
        world_size: Number of ranks of the run.
        strategy: Name of the strategy.
        weights: Shards of the tensors of the model.
        aliases: Further names of tied weights, each with the name under which the tensor is saved.
        optimizer: Shards of the tensors of the optimizer, as ``name of the weight/key``.
        random: The data-parallel rank of this process and its random state; None if it is not saved.
        state: Everything else: small, and equal on every rank.
    """

    step: int
    world_size: int
    strategy: str
    weights: dict[str, Shard]
    aliases: dict[str, str]
    optimizer: dict[str, Shard]
    random: tuple[int, dict[str, Any]] | None
    state: dict[str, Any]

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> Snapshot:
        """Take the checkpoint dict of Lightning apart; without `CheckpointSaver` it has weights only."""
        state = dict(checkpoint)
        parts, aliases = _untied(state.pop("state_dict"))
        return cls(
            step=state["global_step"],
            world_size=state.pop("world_size", 1),
            strategy=state.pop("strategy", "single"),
            weights=parts,
            aliases=aliases,
            optimizer=state.pop("optimizer_states", None) or {},
            random=state.pop("random_state", None),
            state=state,
        )

    def share(self, ranks: Ranks) -> SnapshotShard:
        """Return what this rank writes: each shard is written by the first rank that has it.

        Raises:
            NotFiniteError: Some rank has numbers that are not finite.
        """
        keys_of_ranks = ranks.run_on_all(self._checked_keys)
        owners: dict[Key, int] = {}
        for rank, keys in enumerate(keys_of_ranks):
            for key in keys:
                owners.setdefault(key, rank)
        owned = {key for key in keys_of_ranks[ranks.rank] if owners[key] == ranks.rank}

        def own(kind: str, parts: dict[str, Shard]) -> dict[str, Shard]:
            return {name: part for name, part in parts.items() if (kind, name, part.offsets) in owned}

        random = self.random if self.random is not None and _random_key(self.random[0]) in owned else None
        snapshot = replace(
            self, weights=own("weights", self.weights), optimizer=own("optimizer", self.optimizer), random=random
        )
        return SnapshotShard(
            snapshot, is_sharded=any(rank > 0 and kind != "random" for (kind, *_), rank in owners.items())
        )

    def _kinds(self) -> dict[str, dict[str, Shard]]:
        return {"weights": self.weights, "optimizer": self.optimizer}

    def _checked_keys(self) -> list[Key]:
        """Return the keys of the shards of this rank, without empty shards."""
        self._check_finite()
        keys: list[Key] = [
            (kind, name, part.offsets)
            for kind, parts in self._kinds().items()
            for name, part in parts.items()
            if part.data.numel() or not math.prod(part.shape)
        ]
        return keys if self.random is None else [*keys, _random_key(self.random[0])]

    def _check_finite(self) -> None:
        """Raise an error for numbers that are not finite.

        A finite sum has only finite terms. Sums need no memory and one synchronisation with the device. A sum that is
        not finite can also come from large numbers, so the elements of such a tensor are checked.
        """
        floats = [
            (name, part.data)
            for parts in self._kinds().values()
            for name, part in parts.items()
            if part.data.is_floating_point()
        ]
        if not floats:
            return
        device = floats[0][1].device
        sums = torch.stack([tensor.sum(dtype=torch.float32).to(device) for _, tensor in floats])
        suspects = [floats[index] for index in sums.isfinite().logical_not().nonzero().flatten().tolist()]
        bad = [name for name, tensor in suspects if not tensor.isfinite().all()]
        if bad:
            more = f" and {len(bad) - MAX_NAMED_TENSORS} more" if len(bad) > MAX_NAMED_TENSORS else ""
            message = f"no checkpoint of step {self.step}: {', '.join(bad[:MAX_NAMED_TENSORS])}{more} not finite"
            raise NotFiniteError(message, remedy="resume from an older checkpoint, with a lower learning rate")


@dataclass(frozen=True)
class SnapshotShard:
    """The shards of a checkpoint that one rank writes.

    Attributes:
        snapshot: A snapshot with these shards only.
        is_sharded: Whether more than one rank writes tensors.
    """

    snapshot: Snapshot
    is_sharded: bool

    @property
    def num_bytes(self) -> int:
        """The bytes of its tensors on disk."""
        parts = [*self.snapshot.weights.values(), *self.snapshot.optimizer.values()]
        return sum(part.data.nbytes for part in parts)

    def on_host(self) -> SnapshotShard:
        """Return a copy in host memory, which later steps do not change."""
        live = self.snapshot
        copied = replace(
            live, weights=_copied(live.weights), optimizer=_copied(live.optimizer), state=deepcopy(live.state)
        )
        return replace(self, snapshot=copied)


def _copied(parts: dict[str, Shard]) -> dict[str, Shard]:
    return {name: replace(part, data=part.data.to("cpu", copy=True)) for name, part in parts.items()}


def _random_key(share: int) -> Key:
    return "random", str(share), ()


def _untied(state: Mapping[str, Shard | Tensor]) -> tuple[dict[str, Shard], dict[str, str]]:
    """Return each tensor once, and the further names of tensors that have several."""
    first: dict[object, str] = {}
    identity: object
    parts: dict[str, Shard] = {}
    aliases: dict[str, str] = {}
    for name, given in state.items():
        if isinstance(given, Shard):
            part, identity = given, id(given)
        elif isinstance(given, DTensor):
            message = "save_weights_only does not work for a model that is sharded over several ranks"
            raise HubError(message, where="save_weights_only", remedy="save a full checkpoint, and export from it")
        else:
            part, identity = Shard.of(given), (given.data_ptr(), given.shape) if given.numel() else id(given)
        if identity in first:
            aliases[name] = first[identity]
        else:
            first[identity], parts[name] = name, part
    return parts, aliases
