"""The checkpoint format for Lightning: a folder of safetensors and small states that load without running code.

``weights.safetensors`` and ``optimizer.safetensors`` hold everything where one rank writes, and each writing rank's own
parts (``weights-00001-of-00002.safetensors``) where several do. ``state.pt`` holds the rest, small and the same for all
ranks; ``random-<share>.pt`` the random state of those ranks that run one share of the data.
"""

from __future__ import annotations

import io
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from lightning_hub.checkpoints.async_saver import AsyncSaver
from lightning_hub.checkpoints.rng import reseed, restore_random_state
from lightning_hub.checkpoints.snapshot import Snapshot, SnapshotShard
from lightning_hub.checkpoints.storage import Files, commit, write_file
from lightning_hub.checkpoints.tensors import TensorReader, write_tensors
from lightning_hub.errors import ConfigError, first_line
from lightning_hub.parallel.collectives import Ranks
from lightning_hub.runs.manifest import DamagedError, Manifest, resolve_checkpoint, verify

WEIGHTS = "weights"
OPTIMIZER = "optimizer"
STATE = "state.pt"
_RANDOM = re.compile(r"random-(\d+)\.pt")


class FolderCheckpointIO(CheckpointIO):
    """Writes a Lightning checkpoint as a committed folder and reads it back after verifying it.

    What it reads holds no tensors but `CheckpointTensors`, from which live ones are filled in place.

    Args:
        facts: What a resume compares with, written to the manifest.
        trusted: Whether a folder without a manifest is read as well.
    """

    def __init__(self, facts: dict[str, str] | None = None, *, trusted: bool = False) -> None:
        self.facts = {} if facts is None else facts
        self.trusted = trusted
        self.background: AsyncSaver | None = None
        """Where saves are written; none in the training's own thread."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Commit a checkpoint under ``path``; called on one rank, which holds everything."""
        self._save(Snapshot.of(checkpoint), Path(path), alone=True)

    def save_together(self, checkpoint: dict[str, Any], path: str | Path) -> None:
        """Commit a checkpoint under ``path``; called on every rank, with what it holds."""
        self._save(Snapshot.of(checkpoint), Path(path), alone=False)

    def _save(self, snapshot: Snapshot, path: Path, *, alone: bool) -> None:
        mine = snapshot.share(Ranks(alone=alone))
        manifest = Manifest(snapshot.step, snapshot.world_size, snapshot.strategy, facts=dict(self.facts))
        if self.background is None:
            _commit(path, manifest, mine, Ranks(alone=alone))
            return
        ranks, copy = self.background.ranks(alone=alone), mine.on_host()
        self.background.start(lambda: _commit(path, manifest, copy, ranks))

    def load_checkpoint(
        self, path: str | Path, map_location: object = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Verify and open a checkpoint; pickled objects are refused whatever the caller says.

        Raises:
            ConfigError: This is no folder of ours.
            DamagedError: It is not what its manifest says.
        """
        folder, ranks = resolve_checkpoint(str(path), trusted=self.trusted), Ranks()
        if self.trusted:
            names = [file.name for file in folder.iterdir()]
        else:
            names = [*ranks.run_on_all(lambda: verify(folder, ranks.rank, ranks.size))[0].files]
        state = read_state(folder)
        weights, optimizer = (
            TensorReader(
                folder / name for name in sorted(names) if name.startswith(kind) and name.endswith(".safetensors")
            )
            for kind in (WEIGHTS, OPTIMIZER)
        )
        random = {int(match[1]): folder / name for name in names if (match := _RANDOM.fullmatch(name))}
        restored = CheckpointTensors(weights, optimizer, random)
        return {**state, "state_dict": {}, "optimizer_states": [], "lr_schedulers": [], "restored": restored}

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint folder."""
        shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class CheckpointTensors:
    """What live tensors and random generators are filled from.

    Attributes:
        weights: The model's tensors.
        optimizer: The optimizer's, under ``name of the weight / key``.
        random: Files of random states by share of the data.
    """

    weights: TensorReader
    optimizer: TensorReader
    random: dict[int, Path]

    def restore_random(self, share: int) -> None:
        """Go on with the random numbers of a share; one that did not exist gets numbers of its own."""
        nearest = share if share in self.random else min(self.random, default=None)
        if nearest is not None:
            restore_random_state(_load(self.random[nearest]))
            if nearest != share:
                reseed(share)


def read_state(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint holds beside tensors, for what must be known before there are any.

    Raises:
        DamagedError: It cannot be read.
    """
    return _load(folder / STATE)


def _commit(path: Path, manifest: Manifest, mine: SnapshotShard, ranks: Ranks) -> None:
    commit(path, manifest, lambda folder: _write(folder, mine, ranks), mine.num_bytes, ranks)


def _write(folder: Path, mine: SnapshotShard, ranks: Ranks) -> Files:
    snapshot, ending = mine.snapshot, ".safetensors"
    if mine.is_sharded:
        ending = f"-{ranks.rank + 1:05d}-of-{ranks.size:05d}{ending}"
    files: Files = {}
    for name, parts in ((WEIGHTS, snapshot.weights), (OPTIMIZER, snapshot.optimizer)):
        if parts:
            files |= write_tensors(folder / f"{name}{ending}", parts, snapshot.aliases if name == WEIGHTS else {})
    if snapshot.random is not None:
        share, state = snapshot.random
        files |= write_file(folder / f"random-{share}.pt", [_pickled(state)])
    if ranks.rank == 0:
        files |= write_file(folder / STATE, [_pickled(snapshot.state)])
    return files


def _pickled(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _load(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        message = "this file holds more than tensors and plain values; none of it was run"
        raise ConfigError(message, where=str(path), remedy="resume from a checkpoint of ours") from error
    except (OSError, RuntimeError, EOFError) as error:
        reason = first_line(error)
        raise DamagedError(f"this is no state of ours ({reason})", where=str(path)) from error
    return state
