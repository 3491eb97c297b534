"""The checkpoint format, as a CheckpointIO of Lightning: a folder of files that load without running code.

If one rank writes, ``weights.safetensors`` and ``optimizer.safetensors`` contain all tensors. If several ranks write,
each has its own files with its shards (``weights-00001-of-00002.safetensors``). ``state.pt`` contains everything else,
which is small and equal on all ranks, and ``random-<share>.pt`` the random state of one data-parallel rank.
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
    """Writes a Lightning checkpoint as a committed folder, and verifies a folder before it reads it.

    The loaded checkpoint has `CheckpointTensors` in place of tensors; live tensors are loaded from it in place.

    Args:
        facts: Facts of the run for the comparison at a resume, written to the manifest.
        trusted: Whether to read a folder without a manifest as well.
    """

    def __init__(self, facts: dict[str, str] | None = None, *, trusted: bool = False) -> None:
        self.facts = {} if facts is None else facts
        self.trusted = trusted
        self.background: AsyncSaver | None = None
        """The saver for asynchronous saves; None to write in the training thread."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Commit a checkpoint under ``path``; called on one rank, which has all tensors."""
        self._save(Snapshot.of(checkpoint), Path(path), alone=True)

    def save_together(self, checkpoint: dict[str, Any], path: str | Path) -> None:
        """Commit a checkpoint under ``path``; called on every rank, with its shards."""
        self._save(Snapshot.of(checkpoint), Path(path), alone=False)

    def _save(self, snapshot: Snapshot, path: Path, *, alone: bool) -> None:
        shard = snapshot.share(Ranks(alone=alone))
        manifest = Manifest(snapshot.step, snapshot.world_size, snapshot.strategy, facts=dict(self.facts))
        if self.background is None:
            _commit(path, manifest, shard, Ranks(alone=alone))
            return
        ranks, copy = self.background.ranks(alone=alone), shard.on_host()
        self.background.start(lambda: _commit(path, manifest, copy, ranks))

    def load_checkpoint(
        self, path: str | Path, map_location: object = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Verify and open a checkpoint; pickled objects are always rejected, also if the caller allows them.

        Raises:
            ConfigError: The path is not a checkpoint folder.
            DamagedError: A file is not as the manifest says.
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
    """The tensors and random states of an opened checkpoint.

    Attributes:
        weights: The tensors of the model.
        optimizer: The tensors of the optimizer, as ``name of the weight/key``.
        random: Files of random states by data-parallel rank.
    """

    weights: TensorReader
    optimizer: TensorReader
    random: dict[int, Path]

    def restore_random(self, share: int) -> None:
        """Restore the random state of a data-parallel rank; a rank that did not exist gets a new seed."""
        nearest = share if share in self.random else min(self.random, default=None)
        if nearest is not None:
            restore_random_state(_load(self.random[nearest]))
            if nearest != share:
                reseed(share)


def read_state(folder: Path) -> dict[str, Any]:
    """Return the content of a checkpoint without its tensors; it can be read before a model is built.

    Raises:
        DamagedError: The file cannot be read.
    """
    return _load(folder / STATE)


def _commit(path: Path, manifest: Manifest, shard: SnapshotShard, ranks: Ranks) -> None:
    commit(path, manifest, lambda folder: _write(folder, shard, ranks), shard.num_bytes, ranks)


def _write(folder: Path, shard: SnapshotShard, ranks: Ranks) -> Files:
    snapshot, ending = shard.snapshot, ".safetensors"
    if shard.is_sharded:
        ending = f"-{ranks.rank + 1:05d}-of-{ranks.size:05d}{ending}"
    files: Files = {}
    for name, shards in ((WEIGHTS, snapshot.weights), (OPTIMIZER, snapshot.optimizer)):
        if shards:
            files |= write_tensors(folder / f"{name}{ending}", shards, snapshot.aliases if name == WEIGHTS else {})
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
        message = "this file contains more than tensors and plain values; nothing of it was run"
        raise ConfigError(
            message, where=str(path), remedy="resume from a checkpoint that Lightning Hub wrote"
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        reason = first_line(error)
        raise DamagedError(f"this is not the state file of a checkpoint ({reason})", where=str(path)) from error
    return state
