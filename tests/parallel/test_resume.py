"""A training resumes from a checkpoint of any topology; in the same topology the result is bit-identical."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from lightning_hub.methods.lora import LoRA
from lightning_hub.methods.osft import OSFT
from lightning_hub.methods.sft import SFT
from lightning_hub.runs.manifest import newest_valid, read_manifest
from tests.conftest import WriteRows
from tests.parallel.multiprocess import calm, processes
from tests.parallel.resume_cases import Outcome, ResumeCase, run_cases

NOISY = {"neftune_alpha": 5.0, "lr_scheduler": "cosine"}
"""Random numbers in every step, another learning rate in each."""

DROPPED = {"dropout": 0.2, "r": 4, "lr_scheduler": "cosine"}
"""The same for adapters."""


def assert_same(resumed: list[Outcome], straight: list[Outcome], after: int) -> None:
    """Compare every rank's rest of a training, bit for bit."""
    for found, expected in zip(resumed, straight, strict=True):
        assert found.losses == {step: loss for step, loss in expected.losses.items() if step > after}
        assert found.samples == {step: ids for step, ids in expected.samples.items() if step > after}
        assert found.weights.keys() == expected.weights.keys()
        assert all(found.weights[name].equal(tensor) for name, tensor in expected.weights.items())


@pytest.mark.slow
@pytest.mark.fault("F22")
def test_two_ranks_go_on_exactly(tmp_path: Path, write_rows: WriteRows) -> None:
    data, every_two = write_rows(50), {"val_check_interval": 2}
    everywhere = {2: 2, 5: 0, 7: 2}  # after a validation, at the end of an epoch, in the middle of one: loader workers
    once = {7: 0}  # where a run stops does not depend on its method
    stories: list[ResumeCase] = []
    starts: dict[int, dict[int, int]] = {}
    for topology, name, kind, options, stops in (
        ("ddp", "ddp", SFT, NOISY, everywhere),
        ("fsdp", "fsdp", SFT, NOISY, everywhere),
        ("ddp", "lora-ddp", LoRA, DROPPED, once),
        ("fsdp", "lora-fsdp", LoRA, DROPPED, once),
        ("fsdp", "osft-fsdp", OSFT, NOISY | {"unfreeze_rank_ratio": 0.3}, once),
    ):
        straight = ResumeCase(topology, data, tmp_path / name, kind=kind, method=options, trainer=every_two)
        starts[len(stories)] = stops
        stories.append(straight)
        stories += [
            replace(
                straight,
                folder=tmp_path / f"{name}-{step}",
                resume=straight.folder / f"step-{step}",
                workers=workers,
            )
            for step, workers in stops.items()
        ]
    ranks = processes(2, partial(run_cases, stories), tmp_path)
    for start, stops in starts.items():
        straight_ranks = [results[start] for results in ranks]
        assert sorted(straight_ranks[0].losses) == list(range(1, 11))
        for place, step in enumerate(stops, start + 1):
            assert_same([results[place] for results in ranks], straight_ranks, step)
    assert_manifests(tmp_path)


def assert_manifests(folder: Path) -> None:
    whole, sharded = (read_manifest(folder / name / "step-10") for name in ("ddp", "fsdp"))
    assert (whole.strategy, whole.world_size) == ("ddp", 2)
    assert (sharded.strategy, sharded.world_size) == ("fsdp", 2)
    assert sorted(whole.files) == [
        "optimizer.safetensors", "random-0.pt", "random-1.pt", "state.pt", "weights.safetensors",
    ]  # fmt: skip
    assert sorted(sharded.files) == [
        "optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors", "random-0.pt", "random-1.pt",
        "state.pt", "weights-00001-of-00002.safetensors", "weights-00002-of-00002.safetensors",
    ]  # fmt: skip
    assert_damage_is_passed_over(folder / "fsdp")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "the sha256 of": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\1"),
    "bytes instead of": lambda path: os.truncate(path, 1000),
    "is missing": Path.unlink,
}


def assert_damage_is_passed_over(folder: Path) -> None:
    for place, (sentence, harm) in enumerate(DAMAGE.items()):
        newest = folder / f"step-{10 - place}"
        harm(newest / "weights-00002-of-00002.safetensors")
        found, damaged = newest_valid(folder)
        assert found == folder / f"step-{9 - place}"
        assert damaged[-1].where == str(newest)
        assert "weights-00002-of-00002" in damaged[-1].message
        assert sentence in damaged[-1].message


@pytest.mark.slow
@pytest.mark.fault("F23")
def test_any_topology_goes_on_from_any_other(tmp_path: Path, write_rows: WriteRows) -> None:
    first = ResumeCase(
        "single",
        write_rows(50),
        tmp_path / "one",
        model=calm(),
        method={"lr_scheduler": "constant"},
        trainer={"gradient_clip_val": 1.0},
        settings={"every_n_epochs": None},
    )

    def leg(topology: str, name: str, start: Path | None, end: int) -> ResumeCase:
        return replace(
            first, topology=topology, folder=tmp_path / name, resume=start, trainer={**first.trainer, "max_steps": end}
        )

    # fmt: off
    two = [
        leg("fsdp", "a", None, 2),
        leg("ddp", "b", None, 2),
        leg("fsdp", "b", tmp_path / "b/step-2", 4),
        leg("tp", "b", tmp_path / "b/step-4", 6),
    ]
    one = [first, leg("single", "a", tmp_path / "a/step-2", 4), leg("single", "b", tmp_path / "b/step-6", 10)]
    four = [
        leg("fsdp 2 x tp 2", "a", tmp_path / "a/step-4", 6),
        leg("ddp x 4", "a", tmp_path / "a/step-6", 10),
    ]
    # fmt: on
    of_two = processes(2, partial(run_cases, two), tmp_path)
    straight, second_of_a, last_of_b = run_cases(one)
    of_four = processes(4, partial(run_cases, four), tmp_path)
    a = [[results[0] for results in of_two], [second_of_a], *map(list, zip(*of_four, strict=True))]
    b = [*map(list, zip(*(results[1:] for results in of_two), strict=True)), [last_of_b]]
    for chain in (a, b):
        assert_same_course(chain, straight)


def assert_same_course(chain: list[list[Outcome]], straight: Outcome) -> None:
    """Compare a training that went through several topologies with the unbroken one."""
    losses = {step: loss for ranks in chain for step, loss in ranks[0].losses.items()}
    assert losses == pytest.approx(straight.losses, rel=1e-5)
    for ranks in chain:
        for step in ranks[0].losses:
            seen = {sample for results in ranks for sample in results.samples[step]}
            assert seen == set(straight.samples[step])
    final = chain[-1][0].weights
    assert all((final[name] - tensor).norm() <= 1e-5 * tensor.norm() for name, tensor in straight.weights.items())
