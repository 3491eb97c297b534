"""One task after another: what earlier changes span is left alone, exactly, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_hub.errors import ConfigError
from lightning_hub.methods.osft import OSFT
from lightning_hub.methods.osft.bases import BasesCache, compute_bases
from lightning_hub.methods.osft.export import DELTA_FILE
from lightning_hub.methods.osft.inject import DeltaConfig, inject_deltas, parametrized_weights
from lightning_hub.methods.osft.previous_tasks import PreviousTasks, protect
from lightning_hub.methods.osft.subspace import split_subspace, trained_rank
from lightning_hub.methods.targets import resolve_targets
from lightning_hub.models.pretrained import Pretrained
from tests.methods.osft.test_module import leaks, random_model
from tests.parallel.test_topology import saved


@pytest.mark.slow
@pytest.mark.parametrize("complement", ["full", "thin"])
def test_a_further_task_leaves_alone_what_the_first_has_learnt(
    train: Callable[..., OSFT], tmp_path: Path, complement: str
) -> None:
    first = train(unfreeze_rank_ratio=0.25, complement=complement)
    export = tmp_path / "first"
    first.export(export, first.pretrained.tokenizer)
    second = train(unfreeze_rank_ratio=0.5, complement=complement, model=str(export), previous=[str(export)])
    results = [line for line in second.summary_lines() if "are not sharded" in line]
    assert len(results) == (complement == "full")
    learnt = load_file(export / DELTA_FILE)
    for parametrized in second.parametrized_weights():
        name = parametrized.matrix.full_name
        change = parametrized.delta.dense(parametrized.original).detach().double()
        columns, _ = torch.linalg.qr(learnt[f"{name}.left"].double())
        rows, _ = torch.linalg.qr(learnt[f"{name}.right"].double().mT)
        assert change.norm() > 0
        assert max(leaks(change, columns, rows.mT)) <= 1e-5
        exact = split_subspace(parametrized.original, trained_rank(0.5, min(parametrized.matrix.shape)))
        assert max(leaks(change, exact.u[:, : exact.protected], exact.v[: exact.protected])) <= 1e-5


def test_what_protects_nothing_of_this_model_is_refused(train: Callable[..., OSFT], tmp_path: Path) -> None:
    for family in ("qwen3", "gpt2"):  # the names of this model in other sizes; other names
        first = train(steps=1, model=saved(family), targets=["attention"])
        first.export(tmp_path / family, Pretrained("demo").tokenizer)
        with pytest.raises(
            ConfigError, match=r"has a delta of .*(, which this model does not have|, this model's is )"
        ):
            train(unfreeze_rank_ratio=0.5, previous=[str(tmp_path / family)])


def test_equal_weights_that_have_learnt_other_things_keep_apart(tmp_path: Path) -> None:
    model = random_model("llama")
    targets = resolve_targets(model, ["up_proj"])
    rows, columns = targets[0].shape
    with torch.no_grad():
        first, second, *_ = (model.get_parameter(target.full_name) for target in targets)
        second.copy_(first)
    names = [target.full_name for target in targets]
    learnt = {f"{name}.{end}": torch.randn(rows, 1) if end == "left" else torch.randn(1, columns)
              for name in names for end in ("left", "right")}  # fmt: skip
    save_file(learnt, tmp_path / "changes.safetensors", metadata={"osft": "{}"})
    previous_tasks = PreviousTasks.of([str(tmp_path / "changes.safetensors")])
    inject_deltas(model, targets, DeltaConfig(0.5), num_reserved=previous_tasks.rank)
    compute_bases(list(parametrized_weights(model, targets)), BasesCache(tmp_path), previous_tasks)
    for parametrized in parametrized_weights(model, targets):
        ((_, _, piece, _),) = parametrized.pieces()
        row = learnt[f"{parametrized.matrix.full_name}.right"]
        assert float((piece.get_parameter("v_low") @ row.mT).norm() / row.norm()) < 1e-5


@pytest.mark.parametrize(
    "directions",
    [[-1, -3], [0, -1], [0, 1], [-2, -2], [100, -1], [100, 0], [100, 101]],
    ids=["apart", "half protected", "protected", "twice the same", "beyond", "beyond, protected", "all beyond"],
)
def test_what_is_protected_beside_a_weight_keeps_every_basis_orthonormal(directions: list[int]) -> None:
    torch.manual_seed(0)
    found = split_subspace(torch.randn(40, 16), 8)
    others = torch.linalg.qr(torch.cat([found.u, torch.randn(40, 2).double()], 1)).Q[:, 16:]
    columns = torch.stack([others[:, place - 100] if place >= 100 else found.u[:, place] for place in directions], 1)
    rows = torch.stack([found.v[place % 16] for place in directions])
    both = protect(found, columns, rows)
    for basis in (both.u, both.v.mT):
        assert float((basis.mT @ basis - torch.eye(16)).abs().max()) < 1e-12
    assert both.protected == 10
    for basis, before, span in ((both.u, found.u, columns), (both.v.mT, found.v.mT, rows.mT)):
        high = basis[:, :10]
        for inside in (before[:, :8], span):
            assert float((inside - high @ (high.mT @ inside)).abs().max()) < 1e-12
        assert float((before[:, :8].mT @ basis[:, 10:]).abs().max()) < 1e-12


def test_where_nothing_is_left_to_train_it_is_said(train: Callable[..., OSFT], tmp_path: Path) -> None:
    first = train(unfreeze_rank_ratio=0.25)
    export = tmp_path / "first"
    first.export(export, first.pretrained.tokenizer)
    with pytest.raises(ConfigError, match="previous tasks use 32 directions"):
        train(unfreeze_rank_ratio=0.25, previous=[str(export)])


def altered(name: str, change: Callable[[dict[str, torch.Tensor]], object], export: Path) -> Path:
    """Copy the file of an export's exact changes, and change the tensors in it."""
    with safe_open(export / DELTA_FILE, framework="pt") as file:
        about = file.metadata()
    tensors = load_file(export / DELTA_FILE)
    change(tensors)
    save_file(tensors, export.parent / name, about)
    return export.parent / name


QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.slow
def test_earlier_changes_of_something_else_are_refused(train: Callable[..., OSFT], tmp_path: Path) -> None:
    first = train(unfreeze_rank_ratio=0.25)
    export = tmp_path / "first"
    first.export(export, first.pretrained.tokenizer)
    wrong = {
        "wider": (
            lambda held: held.update({f"{QUERY}.right": torch.zeros(32, 129)}),
            "with the shape 128 x 129, this model's is 128 x 128",
        ),
        "other": (
            lambda held: held.update({"h.0.weight.left": torch.zeros(2, 2)}),
            "h.0.weight, which this model does not have",
        ),
        "nan": (lambda held: held[f"{QUERY}.left"].fill_(float("nan")), f"infinite numbers in the delta of {QUERY}"),
    }
    for name, (change, said) in wrong.items():
        path = altered(name, change, export)
        with pytest.raises(ConfigError, match=said):
            train(unfreeze_rank_ratio=0.5, model=str(export), previous=[str(path)])
    with pytest.raises(ConfigError, match="is named twice"):
        train(unfreeze_rank_ratio=0.75, model=str(export), previous=[str(export), str(export / DELTA_FILE)])
    everything = tmp_path / "all"
    second = train(unfreeze_rank_ratio=1.0)
    second.export(everything, second.pretrained.tokenizer)
    with pytest.raises(ConfigError, match="remove it from targets: it has no direction left"):
        train(unfreeze_rank_ratio=1.0, model=str(everything), previous=[str(everything)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_the_earlier_task_has_not_left_is_noticed(
    train: Callable[..., OSFT], tmp_path: Path, dtype: torch.dtype
) -> None:
    first = train(unfreeze_rank_ratio=0.25)
    export = tmp_path / "first"
    first.export_merged(export, first.pretrained.tokenizer, dtype)
    on = train(unfreeze_rank_ratio=0.5, model=str(export), previous=[str(export)])
    assert not [line for line in on.summary_lines() if "previous" in line]
    astray = train(unfreeze_rank_ratio=0.5, previous=[str(export)])
    (line,) = [line for line in astray.summary_lines() if "previous" in line]
    assert f"21 of 21 weights are not those that the run of {export / DELTA_FILE}" in line
