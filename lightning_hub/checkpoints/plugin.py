"""The checkpoint format for Lightning: a folder of safetensors and tensors that load without running code."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from lightning_hub.checkpoints.storage import commit
from lightning_hub.checkpoints.tensors import load_tensors, num_bytes, save_tensors
from lightning_hub.runs.manifest import DamagedError, Manifest, verify

WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.pt"
STATE = "state.pt"


class FolderCheckpointIO(CheckpointIO):
    """Writes a Lightning checkpoint as a committed folder and reads it back after verifying it.

    Args:
        facts: What a resume compares with, written to the manifest.
    """

    def __init__(self, facts: dict[str, str] | None = None) -> None:
        self.facts = facts or {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Commit a checkpoint under ``path``."""
        state = dict(checkpoint)
        weights, optimizers = state.pop("state_dict"), state.pop("optimizer_states", [])

        def write(folder: Path) -> None:
            save_tensors(weights, folder / WEIGHTS)
            torch.save(optimizers, folder / OPTIMIZER)
            torch.save(state, folder / STATE)

        manifest = Manifest(step=state["global_step"], world_size=1, strategy="single", facts=self.facts)
        needed = num_bytes(weights) + sum(_optimizer_bytes(optimizer) for optimizer in optimizers)
        commit(Path(path), manifest, write, needed)

    def load_checkpoint(
        self, path: str | Path, map_location: object = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Verify and read a checkpoint; pickled objects are refused whatever the caller says."""
        folder = Path(path)
        if not folder.is_dir():
            raise DamagedError(
                "this is no checkpoint folder", where=str(folder), remedy="give a step-<n> folder of a run"
            )
        verify(folder)
        state: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        optimizers = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        return {**state, "state_dict": load_tensors(folder / WEIGHTS), "optimizer_states": optimizers}

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint folder."""
        shutil.rmtree(path, ignore_errors=True)


def _optimizer_bytes(state: dict[str, Any]) -> int:
    return sum(
        value.nbytes for entry in state["state"].values() for value in entry.values() if isinstance(value, torch.Tensor)
    )
