"""One change in several forms: merged or beside the weight, of a fused layer or of its parts, exact or as published."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Phi3Config, PreTrainedModel

from lightning_hub.errors import ConfigError
from lightning_hub.methods.osft.bases import BasesCache, compute_bases
from lightning_hub.methods.osft.delta_usv import UsvDelta
from lightning_hub.methods.osft.export import DELTA_FILE, merge_delta, write_deltas
from lightning_hub.methods.osft.inject import DeltaConfig, ParametrizedWeight, inject_deltas, parametrized_weights
from lightning_hub.methods.osft.previous_tasks import PreviousTasks
from lightning_hub.methods.osft.subspace import split_subspace
from lightning_hub.methods.osft.weight_delta import FusedDelta, WeightDelta
from lightning_hub.methods.targets import resolve_targets
from tests.methods.test_targets import MIXTRAL
from tests.ops.models import CONFIGS, SHAPE, VOCABULARY

PHI3 = Phi3Config(**SHAPE, tie_word_embeddings=False, rms_norm_eps=CONFIGS["llama"].rms_norm_eps)
CONFIG = {"llama": CONFIGS["llama"], "gpt2": CONFIGS["gpt2"], "phi3": PHI3, "mixtral": MIXTRAL}
SHAPES = {"square": (24, 24), "tall": (40, 16), "wide": (16, 40)}


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(deepcopy(CONFIG[family]), attn_implementation="eager")
    if family == "mixtral":
        made.set_experts_implementation("eager")  # the grouped kernels know no float64
    return made.double()


def changed(
    model: PreTrainedModel, cache: Path, form: DeltaConfig, previous_tasks: PreviousTasks | None = None
) -> list[ParametrizedWeight]:
    """Put changes under all layers, in float64."""
    previous_tasks = previous_tasks or PreviousTasks()
    targets = resolve_targets(model, ["attention", "experts"] if "Mixtral" in type(model).__name__ else "all-linear")
    inject_deltas(model, targets, form, num_reserved=previous_tasks.rank)
    found = list(parametrized_weights(model, targets))
    for parametrized in found:
        parametrized.delta.double()
    compute_bases(found, BasesCache(cache), previous_tasks)
    return found


def disturb(found: Iterable[ParametrizedWeight], size: float = 0.02) -> None:
    """Let every change be something, the same for the same shapes in the same order."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parametrized in found:
            for parameter in parametrized.delta.trained():
                parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
            parametrized.delta.project()


def loss_of(model: PreTrainedModel, seed: int = 0) -> Tensor:
    ids = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(seed))
    loss: Tensor = model(ids, labels=ids, use_cache=False).loss
    return loss


def train(model: PreTrainedModel, found: list[ParametrizedWeight], steps: int = 5) -> list[float]:
    trained = [parameter for parametrized in found for parameter in parametrized.delta.trained()]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        losses.append(float(loss.detach()))
        loss.backward()
        for parametrized in found:
            parametrized.delta.project_gradients()
        optimizer.step()
        for parametrized in found:
            parametrized.delta.project()
    return losses


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


# ---- merged and factored -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", [DeltaConfig(0.25), DeltaConfig(0.25, "thin"), DeltaConfig(0.25, parametrization="usv")], ids=str
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_beside_the_weight_is_in_the_weight(family: str, form: DeltaConfig, tmp_path: Path) -> None:
    losses, gradients = [], []
    for how in ("merged", "factored"):
        model = model_of(family)
        found = changed(model, tmp_path, replace(form, forward=how))
        assert {parametrized.delta.forward_as for parametrized in found} == {how}
        disturb(found)
        loss = loss_of(model)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append([parameter.grad for parametrized in found for parameter in parametrized.delta.trained()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert other is not None
        assert distance(other, one) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parametrization", ["delta", "usv"])
@pytest.mark.parametrize("forward", ["merged", "factored"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral"])
def test_before_a_step_no_form_changes_anything(
    family: str, forward: str, parametrization: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = model_of(family)
    nn.Module.to(model, dtype=dtype)
    ids = torch.randint(3, VOCABULARY, (2, 12))
    targets = resolve_targets(model, "attention")
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        inject_deltas(model, targets, DeltaConfig(0.25, forward=forward, parametrization=parametrization))  # type: ignore[arg-type]
        compute_bases(list(parametrized_weights(model, targets)), BasesCache(tmp_path))
        assert model(ids, use_cache=False).logits.equal(before)


@pytest.mark.parametrize(("tokens", "expected"), [(8, "factored"), (100_000, "merged")])
def test_what_computes_less_is_taken(tokens: int, expected: str, tmp_path: Path) -> None:
    model = model_of("llama")
    found = changed(model, tmp_path, DeltaConfig(0.25, row_tokens=tokens))
    square = {parametrized.delta.forward_as for parametrized in found if "o_proj" in parametrized.matrix.name}
    assert square == {expected}
    few = changed(model_of("llama"), tmp_path, DeltaConfig(0.05, row_tokens=None))
    assert {parametrized.delta.forward_as for parametrized in few} == {"factored"}
    whole = changed(model_of("llama"), tmp_path, DeltaConfig(1.0, forward="factored"))
    assert {parametrized.delta.forward_as for parametrized in whole} == {"merged"}


@pytest.mark.slow
@pytest.mark.parametrize("forward", ["merged", "factored"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_block_compiles_in_one_graph_and_copies(family: str, forward: str, tmp_path: Path) -> None:
    model = model_of(family)
    disturb(changed(model, tmp_path, DeltaConfig(0.25, forward=forward)))  # type: ignore[arg-type]
    block = model.get_submodule("model.layers.0")
    given = torch.randn(1, 8, SHAPE["hidden_size"], dtype=torch.float64)
    places = model.get_submodule("model.rotary_emb")(given, torch.arange(8)[None])
    run = partial(block, position_embeddings=places)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert distance(compiled(given, position_embeddings=places), run(given)) < 1e-12
    copied = deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert distance(copied.get_submodule("model.layers.0")(given, position_embeddings=places), given) > 0
    assert run(given).equal(given), "what is left is the residual"


# ---- fused layers ------------------------------------------------------------------------------------------------


def split_apart(fused: PreTrainedModel) -> PreTrainedModel:
    """Return the Llama model that a Phi-3 model is when its fused layers are taken apart."""
    apart = model_of("llama")
    apart.lm_head.weight = nn.Parameter(fused.lm_head.weight.detach().clone())
    state = {}
    for name, tensor in fused.state_dict().items():
        if "qkv_proj" in name:
            for part, rows in zip("qkv", tensor.split([32, 16, 16]), strict=True):
                state[name.replace("qkv", part)] = rows
        elif "gate_up_proj" in name:
            state[name.replace("gate_up", "gate")], state[name.replace("gate_up", "up")] = tensor.chunk(2)
        else:
            state[name] = tensor
    apart.load_state_dict(state)
    return apart


def test_parts_of_a_fused_layer_learn_as_layers_of_their_own(tmp_path: Path) -> None:
    fused = model_of("phi3")
    apart = split_apart(fused)
    assert float((loss_of(fused) - loss_of(apart)).abs()) < 1e-12
    found, single = (changed(model, tmp_path, DeltaConfig(0.25)) for model in (fused, apart))
    assert sum(isinstance(parametrized.delta, FusedDelta) for parametrized in found) == 4
    assert sum(len(list(parametrized.pieces())) for parametrized in found) == len(single)
    assert train(fused, found) == pytest.approx(train(apart, single), rel=1e-9)
    whole = changed(model_of("phi3"), tmp_path, DeltaConfig(0.25, fused="whole"))
    assert not any(isinstance(parametrized.delta, FusedDelta) for parametrized in whole)


@pytest.mark.parametrize(
    "form",
    [DeltaConfig(0.03), DeltaConfig(0.03, forward="factored"), DeltaConfig(0.03, parametrization="usv")],
    ids=str,
)
def test_a_part_for_which_no_direction_is_left_has_nothing_to_cut_and_stays(form: DeltaConfig, tmp_path: Path) -> None:
    fused = model_of("phi3")
    apart = split_apart(fused)
    found, single = (changed(model, tmp_path, form) for model in (fused, apart))
    assert all(parameter.numel() for parameter in fused.parameters()), "full sharding takes no empty ones"
    assert train(fused, found) == pytest.approx(train(apart, single), rel=1e-9)
    for parametrized in found:
        change = parametrized.delta.dense(parametrized.original).detach()
        moved = {name: bool(own.any()) for name, *_, own in parametrized.pieces(change)}
        assert moved == {name: piece.rank > 0 for name, _, piece, _ in parametrized.pieces()}
    assert {piece.rank for parametrized in found for *_, piece, _ in parametrized.pieces()} >= {0, 1}


def test_what_lies_side_by_side_is_known_by_the_layer(tmp_path: Path) -> None:
    parts = {
        family: {
            parametrized.matrix.name.rpartition(".")[2]: [tuple(part.shape) for *_, part in parametrized.pieces()]
            for parametrized in changed(model_of(family), tmp_path, DeltaConfig(0.25))
        }
        for family in ("gpt2", "mixtral")
    }
    assert parts["gpt2"]["c_attn"] == [(32, 32)] * 3
    assert parts["gpt2"]["c_fc"] == [(32, 128)]
    experts = parts["mixtral"]["gate_up_proj"]
    assert len(experts) == 2
    assert len(parts["mixtral"]["down_proj"]) == 1


def test_the_change_of_a_fused_layer_leaks_in_no_part(tmp_path: Path) -> None:
    model = model_of("gpt2")
    found = changed(model, tmp_path, DeltaConfig(0.25))
    train(model, found)
    for parametrized in found:
        change = parametrized.delta.dense(parametrized.original).detach()
        for (_, _, piece, weight), (*_, own) in zip(parametrized.pieces(), parametrized.pieces(change), strict=True):
            exact = split_subspace(weight, piece.rank)
            assert float((exact.u[:, : exact.protected].mT @ own).norm() / own.norm()) < 1e-10
            assert float((own @ exact.v[: exact.protected].mT).norm() / own.norm()) < 1e-10
        assert max(parametrized.delta.leaks(parametrized.original.detach(), change)) < 1e-10


def test_a_further_task_leaves_alone_what_parts_have_learnt(tmp_path: Path) -> None:
    model = model_of("phi3")
    first = changed(model, tmp_path, DeltaConfig(0.25))
    train(model, first)
    learnt = list(merge_delta(first, model.state_dict()))
    write_deltas(tmp_path / DELTA_FILE, learnt, {})
    previous_tasks = PreviousTasks.of([str(tmp_path)])
    further = model_of("phi3")
    second = changed(further, tmp_path, DeltaConfig(0.5), previous_tasks)
    train(further, second)
    before = {name: factors for one in learnt for name, factors in one.factors.items()}
    for parametrized in second:
        change = parametrized.delta.dense(parametrized.original).detach()
        for name, *_, own in parametrized.pieces(change):
            left, right = before.pop(name)
            assert right is not None
            columns, rows = torch.linalg.qr(left)[0], torch.linalg.qr(right.mT)[0].mT
            assert own.norm() > 0
            # what was written is float32
            assert float((columns.mT @ own).norm() / own.norm()) < 1e-6
            assert float((own @ rows.mT).norm() / own.norm()) < 1e-6
    assert not before
    with pytest.raises(ConfigError, match=r"has trained .*qkv_proj as several weights; set fused to parts"):
        changed(model_of("phi3"), tmp_path, DeltaConfig(0.5, fused="whole"), previous_tasks)


# ---- the published form ------------------------------------------------------------------------------------------


def usv_of(weight: Tensor, ratio: float) -> UsvDelta:
    change = UsvDelta((weight.shape[0], weight.shape[1]), ratio).to(weight.dtype)
    with torch.no_grad():
        for name, basis in change.bases_of(split_subspace(weight, change.rank)).items():
            change.get_parameter(name).copy_(basis)
    change.begin()
    return change


def published(weight: Tensor, rank: int, lesson: Callable[[Tensor], Tensor], steps: int) -> Tensor:
    """Train the published form as it is written down, with matrices of its own, and return the weight."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    kept = len(s) - rank
    high = u[:, :kept] * s[:kept] @ v[:kept]
    low = [nn.Parameter(one.clone()) for one in (u[:, kept:], s[kept:], v[kept:])]
    optimizer = torch.optim.AdamW(low, lr=1e-2, weight_decay=0.1)

    def project(left: Tensor, right: Tensor) -> None:
        left -= u[:, :kept] @ (u[:, :kept].mT @ left)
        right -= (right @ v[:kept].mT) @ v[:kept]

    for _ in range(steps):
        optimizer.zero_grad()
        lesson(high + low[0] * low[1] @ low[2]).backward()
        with torch.no_grad():
            assert low[0].grad is not None
            assert low[2].grad is not None
            project(low[0].grad, low[2].grad)
            nn.utils.clip_grad_norm_(low, 0.5)
            optimizer.step()
            project(low[0], low[2])
    with torch.no_grad():
        end: Tensor = high + low[0] * low[1] @ low[2]
    return end


@pytest.mark.parametrize("shape", SHAPES)
def test_the_published_form_takes_the_published_path(shape: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(SHAPES[shape], dtype=torch.float64)
    inputs = torch.randn(64, weight.shape[1], dtype=torch.float64)
    wanted = torch.randn(64, weight.shape[0], dtype=torch.float64)

    def lesson(current: Tensor) -> Tensor:
        return ((inputs @ current.mT - wanted) ** 2).mean()

    change = usv_of(weight, 0.25)
    optimizer = torch.optim.AdamW(change.trained(), lr=1e-2, weight_decay=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        lesson(change(weight)).backward()
        change.project_gradients()
        nn.utils.clip_grad_norm_(change.trained(), 0.5)
        optimizer.step()
        change.project()
    expected = published(weight, change.rank, lesson, 20)
    assert distance(expected, weight) > 1e-3
    assert distance(change(weight).detach() - weight, expected - weight) < 1e-8
    assert max(change.leaks(weight, change.dense(weight).detach())) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_both_forms_reach_the_same_set(shape: str) -> None:
    """The steps that the published form can take from where it begins span what the exact one spans."""
    torch.manual_seed(0)
    weight = torch.randn(SHAPES[shape], dtype=torch.float64)
    change = usv_of(weight, 0.25)

    def reached(u: Tensor, s: Tensor, v: Tensor) -> Tensor:
        u = u - change.u_high @ (change.u_high.mT @ u)
        v = v - (v @ change.v_high.mT) @ change.v_high
        return u * s.mT @ v

    start = (change.u.detach(), change.s.detach(), change.v.detach())
    jacobian = torch.autograd.functional.jacobian(reached, start)
    columns = torch.cat([part.reshape(weight.numel(), -1) for part in jacobian], 1)
    low, long = change.rank, max(weight.shape)
    assert int(torch.linalg.matrix_rank(columns)) == low * max(low, long - change.protected)
    for column in columns.mT.reshape(-1, *weight.shape)[:: max(1, columns.shape[1] // 40)]:
        if column.norm() > 0:
            assert max(change.leaks(weight, column)) < 1e-12


@pytest.mark.parametrize("family", ["llama", "mixtral", "phi3"])
def test_models_learn_in_the_published_form(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    found = changed(model, tmp_path, DeltaConfig(0.25, parametrization="usv"))
    before = [loss_of(model, seed) for seed in range(5)]
    train(model, found)
    assert sum(loss_of(model, seed).detach() for seed in range(5)) < sum(before)
    for parametrized in found:
        weight, change = parametrized.original.detach(), parametrized.delta.dense(parametrized.original).detach()
        assert isinstance(parametrized.delta, WeightDelta)
        assert change.norm() > 0
        assert weight.ndim == 3 or max(parametrized.delta.leaks(weight, change)) < 1e-10
