"""What one process gives to a checkpoint, and which part of it this process writes."""

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
"""What identifies a part in every process: its kind, the name of the whole, and where it begins."""

MAX_NAMED_TENSORS = 3
"""How many tensors an error names."""


class NotFiniteError(HubError):
    """Weights or optimizer hold NaN or infinite numbers: no run could go on from them."""

    kind = "nan"


@dataclass(frozen=True)
class Snapshot:
    """What this process holds of the state of a run.

    Attributes:
        step: Finished optimizer steps.
        world_size: Processes of the run.
        strategy: The strategy's word.
        weights: Parts of the model's tensors.
        aliases: Further names of weights: tied ones are one tensor.
        optimizer: Parts of the optimizer's tensors, under ``name of the weight / key``.
        random: The share of the data that this process runs, and its random state; None if it is not kept.
        state: Everything else: small, and the same in every process.
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
        """Take apart what Lightning saves: with parts and names where our callback has seen it, else weights only."""
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
        """Return what this process writes: each part is written by the first process that holds it.

        Raises:
            NotFiniteError: Some process holds numbers that are not finite.
        """
        held = ranks.run_on_all(self._checked_keys)
        owners: dict[Key, int] = {}
        for rank, keys in enumerate(held):
            for key in keys:
                owners.setdefault(key, rank)
        mine = {key for key in held[ranks.rank] if owners[key] == ranks.rank}

        def own(kind: str, parts: dict[str, Shard]) -> dict[str, Shard]:
            return {name: part for name, part in parts.items() if (kind, name, part.offsets) in mine}

        random = self.random if self.random is not None and _random_key(self.random[0]) in mine else None
        kept = replace(
            self, weights=own("weights", self.weights), optimizer=own("optimizer", self.optimizer), random=random
        )
        return SnapshotShard(kept, is_sharded=any(rank > 0 and kind != "random" for (kind, *_), rank in owners.items()))

    def _kinds(self) -> dict[str, dict[str, Shard]]:
        return {"weights": self.weights, "optimizer": self.optimizer}

    def _checked_keys(self) -> list[Key]:
        """Return what identifies the parts that this process holds, empty shares left out."""
        self._check_finite()
        keys: list[Key] = [
            (kind, name, part.offsets)
            for kind, parts in self._kinds().items()
            for name, part in parts.items()
            if part.data.numel() or not math.prod(part.shape)
        ]
        return keys if self.random is None else [*keys, _random_key(self.random[0])]

    def _check_finite(self) -> None:
        """Refuse numbers that are not finite.

        A finite sum has only finite terms. Sums cost no memory and one wait for the device; those that are not
        finite, which a sum of large numbers can be too, are looked at term by term.
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
        suspects = [floats[place] for place in sums.isfinite().logical_not().nonzero().flatten().tolist()]
        bad = [name for name, tensor in suspects if not tensor.isfinite().all()]
        if bad:
            more = f" and {len(bad) - MAX_NAMED_TENSORS} more" if len(bad) > MAX_NAMED_TENSORS else ""
            message = f"no checkpoint of step {self.step}: {', '.join(bad[:MAX_NAMED_TENSORS])}{more} not finite"
            raise NotFiniteError(message, remedy="go on from an older checkpoint, with a lower learning rate")


@dataclass(frozen=True)
class SnapshotShard:
    """What one process writes of a checkpoint.

    Attributes:
        snapshot: Its parts only.
        several: Whether more than one process writes tensors.
    """

    snapshot: Snapshot
    is_sharded: bool

    @property
    def num_bytes(self) -> int:
        """What it takes on disk."""
        parts = [*self.snapshot.weights.values(), *self.snapshot.optimizer.values()]
        return sum(part.data.nbytes for part in parts)

    def on_host(self) -> SnapshotShard:
        """Return a copy in host memory, which later steps do not change."""
        given = self.snapshot
        copied = replace(
            given, weights=_copied(given.weights), optimizer=_copied(given.optimizer), state=deepcopy(given.state)
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
            message = "weights alone of a model whose parts lie on several ranks cannot be saved"
            raise HubError(message, where="save_weights_only", remedy="save everything, and export from that")
        else:
            part, identity = Shard.of(given), (given.data_ptr(), given.shape) if given.numel() else id(given)
        if identity in first:
            aliases[name] = first[identity]
        else:
            first[identity], parts[name] = name, part
    return parts, aliases
