"""A resumed run uses the bases and ranks of its checkpoint, and does not compute them again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_hub.errors import HubError
from lightning_hub.launch.environment import ProcessInfo
from lightning_hub.methods.osft import OSFT
from lightning_hub.methods.osft.bases import BasesCache, compute_bases
from lightning_hub.methods.osft.importance import layer_ratios, similarities
from lightning_hub.methods.osft.inject import DeltaConfig, inject_deltas, parametrized_weights
from lightning_hub.methods.osft.subspace import DecompositionError
from lightning_hub.methods.run_context import RunContext, run_context
from lightning_hub.methods.targets import resolve_targets
from lightning_hub.ops.batch import PackedSequence
from lightning_hub.parallel.process_group import destroy_process_group, init_process_group
from lightning_hub.runs.manifest import DamagedError
from tests.conftest import WriteRows
from tests.ops.models import VOCABULARY, make
from tests.parallel.multiprocess import processes
from tests.parallel.resume_cases import Outcome, ResumeCase, run_cases

SETTINGS: dict[str, dict[str, Any]] = {
    "adaptive": {"ranks": "adaptive", "rank_bounds": (0.05, 0.6), "learning_rate": 1e-3},
    "published": {"parametrization": "usv", "learning_rate": 1e-3},
    "beside": {"forward": "factored", "complement": "thin", "unfreeze_rank_ratio": 0.1, "learning_rate": 1e-3},
}


def stories(topology: str, data: Path, folder: Path) -> tuple[list[ResumeCase], list[ResumeCase]]:
    """Return trainings, and the same from their third step on."""
    learnt = data.parent / "learnt.safetensors"
    if not learnt.exists():  # of a tall weight, whose basis is kept beside its parameters then
        name = "model.layers.1.mlp.gate_proj.weight"
        save_file(
            {f"{name}.left": torch.randn(256, 4), f"{name}.right": torch.randn(4, 128)}, learnt, metadata={"osft": "{}"}
        )
    chained = {"previous": [str(learnt)], "learning_rate": 1e-3}
    whole = [
        ResumeCase(topology, data, folder / name, kind=OSFT, method=options, trainer={"max_steps": 5})
        for name, options in {**SETTINGS, "chained": chained}.items()
    ]
    rest = [replace(one, folder=folder / f"{one.folder.name}-3", resume=one.folder / "step-3") for one in whole]
    return whole, rest


def assert_same(resumed: Outcome, straight: Outcome) -> None:
    assert resumed.losses == {step: loss for step, loss in straight.losses.items() if step > 3}
    assert resumed.weights.keys() == straight.weights.keys()
    assert all(resumed.weights[name].equal(tensor) for name, tensor in straight.weights.items())


@pytest.mark.slow
def test_one_process_goes_on_without_a_cache(
    tmp_path: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, rest = stories("single", write_rows(50), tmp_path)
    monkeypatch.setenv("LIGHTNING_HUB_CACHE", str(tmp_path / "cache"))
    straight = run_cases(whole)
    assert list((tmp_path / "cache" / "bases").iterdir())
    monkeypatch.setenv("LIGHTNING_HUB_CACHE", str(tmp_path / "empty"))
    for resumed, expected in zip(run_cases(rest), straight, strict=True):
        assert_same(resumed, expected)
    assert not (tmp_path / "empty" / "bases").exists()
    checkpoint = whole[0].folder / "step-3"
    with run_context(RunContext(resume_from=checkpoint)):
        built = OSFT("demo", dtype="float32", **SETTINGS["adaptive"])
    built.build_empty()  # without data: the ranks are the checkpoint's
    held = load_file(checkpoint / "weights.safetensors")
    assert dict(_shapes(dict(built.named_parameters()))) == dict(_shapes(held))


def _shapes(tensors: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    return ((name, tuple(tensor.shape)) for name, tensor in tensors.items() if name.endswith(".delta"))


@pytest.mark.slow
def test_two_ranks_go_on_without_a_cache(
    tmp_path: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(50)
    pairs = [stories(topology, data, tmp_path / topology) for topology in ("ddp", "fsdp")]
    whole, rest = ([story for pair in pairs for story in pair[half]] for half in (0, 1))
    monkeypatch.setenv("LIGHTNING_HUB_CACHE", str(tmp_path / "cache"))
    for results in processes(2, partial(_in_turn, whole, rest, tmp_path / "empty"), tmp_path):
        for resumed, expected in zip(results[len(whole) :], results[: len(whole)], strict=True):
            assert_same(resumed, expected)
    assert not (tmp_path / "empty" / "bases").exists()


def _in_turn(whole: list[ResumeCase], rest: list[ResumeCase], empty: Path) -> list[Outcome]:
    first = run_cases(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_HUB_CACHE", str(empty))
        return first + run_cases(rest)


@pytest.mark.slow
def test_altered_bases_are_refused(tmp_path: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_HUB_CACHE", str(tmp_path / "cache"))
    whole = ResumeCase("single", write_rows(50), tmp_path / "run", kind=OSFT, trainer={"max_steps": 2})
    run_cases([whole])
    weights = tmp_path / "run" / "step-2" / "weights.safetensors"
    held = load_file(weights)
    name = next(name for name in held if name.endswith("u_low"))
    held[name][:, 0] *= -1  # as good a basis, but not the one that the trained numbers belong to
    save_file(held, weights)
    with pytest.raises(DamagedError, match=r"weights\.safetensors has"):
        run_cases([replace(whole, folder=tmp_path / "again", resume=tmp_path / "run" / "step-2")])


def test_a_checkpoint_of_other_ranks_is_refused(
    tmp_path: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_HUB_CACHE", str(tmp_path / "cache"))
    whole = ResumeCase("single", write_rows(50), tmp_path / "run", kind=OSFT, trainer={"max_steps": 2})
    run_cases([whole])
    other = replace(
        whole, folder=tmp_path / "again", resume=tmp_path / "run" / "step-2", method={"unfreeze_rank_ratio": 0.5}
    )
    with pytest.raises(HubError, match=r"is stored with the shape \(32, 32\)"):
        run_cases([other])


# ---- ranks by importance -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.2, 0.3), (0.25, 0.25)])
@pytest.mark.parametrize("alike", [[0.9, 0.5, 0.99, 0.7], [1.0, 1.0, 1.0], [-0.5, 0.9], [0.0, 0.0]])
def test_shares_keep_their_mean_and_bounds_and_follow_importance(
    alike: list[float], bounds: tuple[float, float]
) -> None:
    shares = layer_ratios(alike, 0.25, bounds)
    assert sum(shares) / len(shares) == pytest.approx(0.25, abs=2e-4)
    assert all(bounds[0] <= share <= bounds[1] for share in shares)
    order = sorted(range(len(alike)), key=lambda layer: alike[layer])
    assert [shares[layer] for layer in order] == sorted(shares, reverse=True)


def test_without_bounds_the_shares_are_those_of_the_paper() -> None:
    alike = [0.95, 0.85, 0.9]
    mean = sum(alike) / 3
    protected = [0.1 + one / mean * (0.8 - 0.1) for one in alike]
    assert layer_ratios(alike, 0.2) == pytest.approx([1 - share for share in protected], abs=1e-4)


def test_similarities_are_those_of_the_hidden_states() -> None:
    model = make("llama", "sdpa").eval()
    ids = torch.randint(3, VOCABULARY, (1, 30))
    seen: list[torch.Tensor] = []
    for layer in model.get_submodule("model.layers").children():
        layer.register_forward_hook(lambda layer, args, output: seen.extend([args[0], output]))
    with torch.no_grad():
        model(ids, use_cache=False)
    expected = [
        float(nn.functional.cosine_similarity(given.double(), made.double(), dim=-1).mean())
        for given, made in zip(seen[::2], seen[1::2], strict=True)
    ]
    found = similarities(make("llama", "sdpa"), [PackedSequence.pack([(ids[0], ids[0])], (0,))])
    assert found == pytest.approx(expected, abs=1e-6)


# ---- a rank that cannot decompose --------------------------------------------------------------------------------


def one_is_broken(cache: Path) -> str:
    """Decompose as a rank of two, of which one has a weight with a NaN."""
    rank = int(os.environ["RANK"])
    init_process_group(ProcessInfo(rank, 2, rank, 2, "env"), on_gpu=False)
    model = make("llama", "sdpa")
    targets = resolve_targets(model, "all-linear")
    inject_deltas(model, targets, DeltaConfig(0.25))
    found = list(parametrized_weights(model, targets))
    with torch.no_grad():
        found[3].original[0, 0] = float("nan")
    try:
        compute_bases(found, BasesCache(cache))
    except DecompositionError as error:
        return str(error)
    finally:
        destroy_process_group()
    return "nothing was said"


@pytest.mark.slow
def test_a_weight_that_is_no_number_stops_every_rank(tmp_path: Path) -> None:
    sentences = processes(2, partial(one_is_broken, tmp_path / "cache"), tmp_path)
    assert sentences[0] == sentences[1]
    assert "model.layers.0.self_attn.o_proj" in sentences[0]


def test_what_is_behind_is_told(tmp_path: Path) -> None:
    model = make("llama", "sdpa")
    targets = resolve_targets(model, "all-linear")
    inject_deltas(model, targets, DeltaConfig(0.25))
    results: list[float] = []
    assert compute_bases(list(parametrized_weights(model, targets)), BasesCache(tmp_path), done=results.append) == len(
        targets
    )
    assert results == sorted(results)
    assert results[-1] == pytest.approx(1.0)
    assert len(results) == len(targets)
