from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from lightning_hub.checkpoints.checkpoint_io import STATE, FolderCheckpointIO
from lightning_hub.checkpoints.rng import random_state, restore_random_state
from lightning_hub.checkpoints.snapshot import NotFiniteError
from lightning_hub.checkpoints.storage import commit, write_file
from lightning_hub.checkpoints.tensors import Shard, TensorReader, write_tensors
from lightning_hub.errors import ConfigError
from lightning_hub.runs.manifest import DamagedError, Manifest, verify


def draw() -> list[float]:
    return [float(torch.rand(())), float(np.random.rand()), random.random()]


def test_random_states_come_back() -> None:
    state = random_state()
    first = draw()
    restore_random_state(state)
    assert draw() == first


def read(stored: TensorReader, name: str) -> Tensor:
    """Return a whole stored tensor."""
    tensor = torch.empty(stored.shape(name))
    stored.fill(name, Shard.of(tensor))
    return tensor


def test_parts_make_up_the_whole_and_torch_reads_them_too(tmp_path: Path) -> None:
    whole = {"a": torch.randn(7, 5), "b": torch.randn(3), "c": torch.randn(()), "d": torch.randn(4, 2, 3)}
    cuts = {name: max(1, len(tensor) // 2) for name, tensor in whole.items() if tensor.ndim}
    above = {name: Shard(whole[name][:cut], (0,) * whole[name].ndim, ()) for name, cut in cuts.items()}
    below = {name: Shard(whole[name][cut:], (cut, *above[name].offsets[1:]), ()) for name, cut in cuts.items()}
    first = write_tensors(tmp_path / "1.safetensors", {**above, "c": Shard.of(whole["c"])}, {"e": "a"})
    again = write_tensors(tmp_path / "again", {**above, "c": Shard.of(whole["c"])}, {"e": "a"})
    assert [*first.values()] == [*again.values()], "the same bytes each time"
    write_tensors(tmp_path / "2.safetensors", below, {})
    stored = TensorReader([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    assert sorted(stored.names()) == ["a", "b", "c", "d", "e"]
    for name, tensor in {**whole, "e": whole["a"]}.items():
        assert read(stored, name).equal(tensor), name
    middle = torch.zeros(3, 2)
    stored.fill("a", Shard(middle, (2, 1), (7, 5)))
    assert middle.equal(whole["a"][2:5, 1:3])

    (tmp_path / "again").unlink()
    theirs = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    dcp_load(theirs, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert all(theirs[name].equal(tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_every_dtype_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1, 0, 3]]).to(dtype)
    write_tensors(tmp_path / "t", {"odd": Shard.of(tensor[:, :1]), "x": Shard.of(tensor.T)}, {})
    found = torch.empty(3, 1, dtype=dtype)
    TensorReader([tmp_path / "t"]).fill("x", Shard.of(found))
    assert found.equal(tensor.T)


def test_another_shape_or_a_missing_name_is_said(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t", {"x": Shard.of(torch.zeros(3, 2))}, {})
    stored = TensorReader([tmp_path / "t"])
    with pytest.raises(DamagedError, match=r"x is stored with the shape \(3, 2\), the model has \(2, 2\)"):
        stored.fill("x", Shard.of(torch.zeros(2, 2)))
    with pytest.raises(DamagedError, match="y is not stored"):
        stored.fill("y", Shard.of(torch.zeros(2, 2)))
    (tmp_path / "t").write_bytes(b"no header")
    with pytest.raises(DamagedError, match="is not a tensor file of a checkpoint"):
        TensorReader([tmp_path / "t"])


def checkpoint(**changes: Any) -> dict[str, Any]:
    table = torch.randn(4, 3)
    given = {
        "global_step": 3,
        "state_dict": {"embed": table, "head": table, "w": torch.randn(3), "same shape": table.clone()},
        "optimizer_states": {"w/exp_avg": Shard.of(torch.randn(3))},
        "random_state": (0, random_state()),
        "loops": {"epoch": 1},
    }
    return given | changes


@pytest.mark.security("S2")
def test_everything_written_loads_without_running_code(tmp_path: Path) -> None:
    given = checkpoint()
    FolderCheckpointIO({"data": "x"}).save_checkpoint(given, tmp_path / "step-3")
    expected = draw()
    found = FolderCheckpointIO().load_checkpoint(tmp_path / "step-3")
    assert found["loops"] == {"epoch": 1}
    for name, tensor in given["state_dict"].items():
        assert read(found["restored"].weights, name).equal(tensor)
    assert read(found["restored"].optimizer, "w/exp_avg").equal(given["optimizer_states"]["w/exp_avg"].data)
    found["restored"].restore_random(0)
    assert draw() == expected
    assert {path.suffix for path in (tmp_path / "step-3").iterdir()} == {".safetensors", ".pt", ".json"}
    assert verify(tmp_path / "step-3").facts == {"data": "x"}


def test_shares_that_had_no_random_state_draw_numbers_of_their_own(tmp_path: Path) -> None:
    FolderCheckpointIO().save_checkpoint(checkpoint(), tmp_path / "step-3")
    restored = FolderCheckpointIO().load_checkpoint(tmp_path / "step-3")["restored"]

    def after(share: int) -> list[float]:
        restored.restore_random(share)
        return draw()

    assert after(1) == after(1)
    assert len({*after(0), *after(1), *after(2)}) == 9


@pytest.mark.fault("F32")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_never_saved(tmp_path: Path, value: float) -> None:
    large = torch.full((9,), 3e38)  # its sum is infinite, no term of it is
    FolderCheckpointIO().save_checkpoint(checkpoint(state_dict={"large": large}), tmp_path / "step-3")
    bad = {"good": torch.zeros(2), "late": torch.tensor([0.0, value, -value])}
    with pytest.raises(NotFiniteError, match="step 3: late not finite"):
        FolderCheckpointIO().save_checkpoint(checkpoint(state_dict=bad), tmp_path / "step-4")
    moments = {"w/exp_avg": Shard.of(torch.tensor([value]))}
    with pytest.raises(NotFiniteError, match="w/exp_avg not finite"):
        FolderCheckpointIO().save_checkpoint(checkpoint(optimizer_states=moments), tmp_path / "step-4")
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_a_folder_is_replaced_once_the_new_one_is_whole(tmp_path: Path) -> None:
    FolderCheckpointIO().save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
    bad = checkpoint(state_dict={"w": torch.tensor([float("nan")])})
    with pytest.raises(NotFiniteError):
        FolderCheckpointIO().save_checkpoint(bad, tmp_path / "last.ckpt")
    assert verify(tmp_path / "last.ckpt").step == 3
    FolderCheckpointIO().save_checkpoint(checkpoint(global_step=5), tmp_path / "last.ckpt")
    assert verify(tmp_path / "last.ckpt").step == 5
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.security("S1")
@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("file", [STATE, "random-0.pt", ".metadata"])
def test_a_hostile_checkpoint_runs_nothing(tmp_path: Path, file: str, trusted: bool) -> None:
    canary = tmp_path / "canary"
    torch.save(Payload(canary), tmp_path / "hostile")
    hostile = (tmp_path / "hostile").read_bytes()
    torch.save(random_state() if file == STATE else {}, tmp_path / "harmless")
    harmless = (tmp_path / "harmless").read_bytes()
    blocks = {STATE: [harmless], "random-0.pt": [harmless]} | {file: [hostile]}
    target = tmp_path / "step-1"
    commit(
        target,
        Manifest(1, 1, "single"),
        lambda folder: {k: v for name, data in blocks.items() for k, v in write_file(folder / name, data).items()},
    )
    if trusted:
        (target / "manifest.json").unlink()

    def load() -> None:
        FolderCheckpointIO(trusted=trusted).load_checkpoint(target)["restored"].restore_random(0)

    # The harmless random state is empty: with a .metadata, which nothing opens, loading goes as far as that.
    refusal = (KeyError, "torch") if file == ".metadata" else (ConfigError, "nothing of it was run")
    with pytest.raises(refusal[0], match=refusal[1]):
        load()
    assert not canary.exists()


@pytest.mark.security("S1")
def test_only_folders_of_ours_are_read(tmp_path: Path) -> None:
    torch.save(Payload(tmp_path / "canary"), tmp_path / "model.ckpt")
    (tmp_path / "foreign").mkdir()
    reader = FolderCheckpointIO()
    for path, words in (
        (tmp_path / "model.ckpt", "not a checkpoint folder"),
        ("https://example.com/step-1", "is a URL"),
        (tmp_path / "foreign", "pass --trust-checkpoint"),
    ):
        with pytest.raises(ConfigError, match=words):
            reader.load_checkpoint(path)
    assert not (tmp_path / "canary").exists()
