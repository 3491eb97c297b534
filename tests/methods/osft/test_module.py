"""OSFT on models: nothing changes before a step, nothing else changes after it, and what is protected stays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_hub.errors import ConfigError
from lightning_hub.methods.osft import OSFT
from lightning_hub.methods.osft.bases import BasesCache, assign_owners, compute_bases, decompose, decomposition_cost
from lightning_hub.methods.osft.delta_exact import ExactDelta
from lightning_hub.methods.osft.export import DELTA_FILE
from lightning_hub.methods.osft.inject import DeltaConfig, ParametrizedWeight, inject_deltas, parametrized_weights
from lightning_hub.methods.osft.subspace import split_subspace
from lightning_hub.methods.targets import WeightMatrix, resolve_targets
from lightning_hub.models.generation import complete
from lightning_hub.models.pretrained import Pretrained
from lightning_hub.parallel.fsdp import check_dtypes, decoder_blocks
from tests.methods.test_targets import MIXTRAL
from tests.ops.models import CONFIGS, VOCABULARY

FAMILIES = ["llama", "qwen3", "gpt2", "gpt-oss, sinks", "mixtral"]


def random_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = deepcopy(MIXTRAL if family == "mixtral" else CONFIGS[family])
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return made.bfloat16() if dtype == torch.bfloat16 else made


def changed(model: PreTrainedModel, folder: Path, ratio: float = 0.25) -> list[ParametrizedWeight]:
    groups = [group for group in ("attention", "mlp", "experts") if group != "experts" or has_experts(model)]
    targets = resolve_targets(model, [group for group in groups if group != "mlp" or not has_experts(model)])
    inject_deltas(model, targets, DeltaConfig(ratio))
    found = list(parametrized_weights(model, targets))
    compute_bases(found, BasesCache(folder))
    return found


def rank_of(parametrized: ParametrizedWeight) -> int:
    ((_, _, piece, _),) = parametrized.pieces()
    return piece.rank


def has_experts(model: PreTrainedModel) -> bool:
    return any(parameter.ndim == 3 for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_before_a_step_nothing_has_changed(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(family, dtype).eval()
    ids = torch.randint(3, VOCABULARY, (2, 12))
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        found = changed(model, tmp_path)
        after = model(ids, use_cache=False).logits
    assert found
    assert after.equal(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_change_and_leave_what_is_protected(family: str, tmp_path: Path) -> None:
    model = random_model(family)
    found = changed(model, tmp_path)
    originals = [parametrized.original.detach().clone() for parametrized in found]
    trained = [parameter for parametrized in found for parameter in parametrized.delta.trained()]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for seed in range(5):
        torch.manual_seed(seed)
        ids = torch.randint(3, VOCABULARY, (4, 16))
        optimizer.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    for parametrized, original in zip(found, originals, strict=True):
        assert parametrized.original.equal(original)
        change = parametrized.delta.dense(original).detach()
        pieces = zip(parametrized.pieces(change), parametrized.pieces(original), strict=True)
        for (name, _, piece, own), (_, _, _, part) in pieces:
            assert float(own.abs().sum()) > 0
            for moved, weight in slices(own, part):
                exact = split_subspace(weight, piece.rank)
                for leak in leaks(moved, exact.u[:, : exact.protected], exact.v[: exact.protected]):
                    assert leak <= 1e-5, name


def slices(change: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(change, weight, strict=True) if change.ndim == 3 else [(change, weight)]


def leaks(change: Tensor, u_high: Tensor, v_high: Tensor) -> tuple[float, float]:
    exact = change.double()
    return float((u_high.mT @ exact).norm() / exact.norm()), float((exact @ v_high.mT).norm() / exact.norm())


def test_an_expert_is_a_weight_of_its_own() -> None:
    torch.manual_seed(0)
    weights = torch.randn(3, 20, 12)
    together = ExactDelta((20, 12), 0.25, "full", experts=3)
    alone = [ExactDelta((20, 12), 0.25, "full") for _ in range(3)]
    trained = torch.randn(3, *alone[0].delta.shape)
    with torch.no_grad():
        together.delta.copy_(trained)
        for name, basis in decompose(weights, together, "weights").items():
            getattr(together, name).copy_(basis)
        for place, delta in enumerate(alone):
            delta.delta.copy_(trained[place])
            for name, basis in decompose(weights[place], delta, "weight").items():
                getattr(delta, name).copy_(basis)
    for place, delta in enumerate(alone):
        assert torch.allclose(together.dense(weights)[place], delta.dense(weights[place]), atol=1e-6)


def test_an_export_without_a_step_is_the_model_bit_by_bit(train: Callable[..., OSFT], tmp_path: Path) -> None:
    model = Pretrained("demo").load(dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, :2] = -0.0  # of which a sum with 0 is +0.0
    model.save_pretrained(tmp_path / "signed")
    module = train(steps=0, model=str(tmp_path / "signed"))
    module.configure_model()
    _, exported = module.export_state()
    plain = module.pretrained.load(dtype=torch.float32, attn_implementation="sdpa").state_dict()
    assert exported.keys() == plain.keys()
    for name, tensor in plain.items():
        assert exported[name].numpy().tobytes() == tensor.numpy().tobytes(), name


def test_only_the_changes_are_trained(train: Callable[..., OSFT]) -> None:
    module = train()
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.endswith(".delta") for name in trained)
    _, exported = module.export_state()
    plain = module.pretrained.load(dtype=torch.float32, attn_implementation="sdpa").state_dict()
    moved = {name for name, tensor in plain.items() if not exported[name].equal(tensor)}
    assert moved == {parametrized.matrix.full_name for parametrized in module.parametrized_weights()}
    tied = {tensor.data_ptr(): tensor for tensor in plain.values()}.values()
    assert module.num_parameters == sum(tensor.numel() for tensor in tied)


def test_norms_in_bfloat16_are_not_sharded_with_changes_in_float32() -> None:
    model = random_model("llama", torch.bfloat16)
    OSFT("unused").choose_trainable(model)
    check_dtypes(model, decoder_blocks(model))
    OSFT("unused", train_other="norms").choose_trainable(another := random_model("llama", torch.bfloat16))
    with pytest.raises(ConfigError, match="train in bfloat16 and others in float32"):
        check_dtypes(another, decoder_blocks(another))


def test_what_is_exported_is_what_the_model_computes(train: Callable[..., OSFT]) -> None:
    module = train()
    model, exported = module.export_state()
    plain = module.pretrained.load(dtype=torch.float32, attn_implementation="eager")
    plain.load_state_dict(exported)
    model.set_attn_implementation("eager")
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert model.eval()(ids, use_cache=False).logits.equal(plain.eval()(ids, use_cache=False).logits)


def test_the_published_form_is_projected_before_clipping_and_after_the_step(train: Callable[..., OSFT]) -> None:
    shares: list[float] = []

    class Watched(OSFT):
        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            for parametrized in self.parametrized_weights():
                for _, _, piece, _ in parametrized.pieces():
                    gradient, high = piece.get_parameter("u").grad, piece.get_parameter("u_high")
                    assert gradient is not None
                    shares.append(float((high.mT @ gradient).norm() / gradient.norm()))
            super().configure_gradient_clipping(*args, **kwargs)

    module = train(kind=Watched, parametrization="usv", weight_decay=0.1)
    assert len(shares) == 3 * len(list(module.parametrized_weights()))
    assert max(shares) < 1e-5
    for parametrized in module.parametrized_weights():
        change = parametrized.delta.dense(parametrized.original).detach()
        exact = split_subspace(parametrized.original, rank_of(parametrized))
        assert change.norm() > 0
        assert max(leaks(change, exact.u[:, : exact.protected], exact.v[: exact.protected])) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("form", [{}, {"forward": "factored"}, {"parametrization": "usv"}], ids=str)
@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed"])
def test_what_trains_is_float32_in_every_precision(
    train: Callable[..., OSFT], precision: str, form: dict[str, object]
) -> None:
    module = train(precision=precision, learning_rate=1e-5, **form)
    halves = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
    for parametrized in module.parametrized_weights():
        assert parametrized.original.dtype == halves.get(precision, torch.float32)
        assert {parameter.dtype for parameter in parametrized.delta.trained()} == {torch.float32}
        assert parametrized.delta.dense(parametrized.original).any(), (
            "steps as small as these are lost in half precision"
        )


def test_other_weights_train_when_they_are_asked_to(train: Callable[..., OSFT]) -> None:
    norms = train(train_other="norms")
    trained = {name for name, parameter in norms.named_parameters() if parameter.requires_grad}
    assert any("norm" in name for name in trained)
    assert all("norm" in name or name.endswith(".delta") for name in trained)
    everything = train(train_other="all")
    trained = {name for name, parameter in everything.named_parameters() if parameter.requires_grad}
    assert any("embed" in name for name in trained)
    assert all(name.endswith(".delta") for name in trained if ".parametrizations." in name), "neither weights nor bases"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_norms_are_found_by_what_they_are(family: str) -> None:
    model = random_model(family)
    OSFT("unused", train_other="norms").choose_trainable(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    norms = {name for name in trained if not name.endswith(".delta")}
    assert norms == {name for name, _ in model.named_parameters() if "norm" in name or ".ln_" in name}


def test_a_second_start_decomposes_nothing(train: Callable[..., OSFT]) -> None:
    assert train(steps=0, complement="thin").decomposed > 0
    assert train(steps=1, complement="thin").decomposed == 0
    assert train(steps=1, complement="thin", unfreeze_rank_ratio=0.5).decomposed > 0


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "bases").write_text("a file where a folder should be")
    assert changed(random_model("llama"), tmp_path)


def test_the_learning_rate_of_the_changes_is_scaled(train: Callable[..., OSFT]) -> None:
    module = train(lr_scale=0.5, train_other="norms")
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    rates: dict[float, set[str]] = {}
    for group in module.trainer.optimizers[0].param_groups:
        rates.setdefault(group["initial_lr"], set()).update(names[id(one)] for one in group["params"])
    assert {rate: {"norm" in name for name in found} for rate, found in rates.items()} == {1e-3: {True}, 5e-4: {False}}
    assert all(name.endswith(".delta") for name in rates[5e-4])


def test_the_exact_changes_stand_beside_the_export(
    train: Callable[..., OSFT], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = train(targets=["attention"])
    target = tmp_path / "export"
    module.export(target, module.pretrained.tokenizer)
    changes, exported = load_file(target / DELTA_FILE), load_file(target / "model.safetensors")
    plain = module.pretrained.load(dtype=torch.float32, attn_implementation="sdpa").state_dict()
    for parametrized in module.parametrized_weights():
        name = parametrized.matrix.full_name
        assert (plain[name] + changes[f"{name}.left"] @ changes[f"{name}.right"]).equal(exported[name])
    with safe_open(target / DELTA_FILE, framework="pt") as file:
        about = json.loads(file.metadata()["osft"])
    names = [parametrized.matrix.full_name for parametrized in module.parametrized_weights()]
    assert about["weights"] == {name: hashlib.sha256(plain[name].numpy().tobytes()).hexdigest() for name in names}
    assert about["settings"]["unfreeze_rank_ratio"] == 0.25
    pairs = [
        (exported[parametrized.matrix.full_name], plain[parametrized.matrix.full_name])
        for parametrized in module.parametrized_weights()
    ]
    size = sum(float((end - start).square().sum()) for end, start in pairs)
    share = (size / sum(float(start.square().sum()) for _, start in pairs)) ** 0.5
    assert f"changed by {share:.2%} (attention)" in capsys.readouterr().out
    ids = torch.arange(3, 30)[None]
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert loaded(ids).logits.isfinite().all()


def test_that_nothing_has_changed_is_said(
    train: Callable[..., OSFT], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = train(unfreeze_rank_ratio=0.0, train_other="norms")
    module.export(tmp_path / "export", module.pretrained.tokenizer)
    assert "osft   no target has a direction that trains" in capsys.readouterr().out


@pytest.mark.parametrize("forward", ["merged", "factored"])
def test_answers_build_each_weight_once(
    train: Callable[..., OSFT], forward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = train(forward=forward, steps=5)
    prompts, tokenizer = [[{"role": "user", "content": "Spell kamo."}]], module.pretrained.tokenizer
    plain = module.pretrained.load(dtype=torch.float32, attn_implementation="sdpa")
    plain.load_state_dict(module.export_state()[1])
    built: list[ExactDelta] = []
    dense = ExactDelta.dense

    def counted(self: ExactDelta, weight: Tensor) -> Tensor:
        built.append(self)
        return dense(self, weight)

    monkeypatch.setattr(ExactDelta, "dense", counted)
    assert module.generate(prompts, tokenizer) == complete(plain, tokenizer, prompts)
    assert len(built) == len(set(built)) == len(list(module.parametrized_weights()))
    assert {parametrized.delta.forward_as for parametrized in module.parametrized_weights()} == {forward}


def test_what_rounding_does_to_a_change_is_said(train: Callable[..., OSFT], tmp_path: Path) -> None:
    module = train(steps=10)
    said = module.export_merged(tmp_path / "merged", module.pretrained.tokenizer, torch.bfloat16)
    rounded = load_file(tmp_path / "merged" / "model.safetensors")
    plain = module.pretrained.load(dtype=torch.float32, attn_implementation="sdpa").state_dict()
    worst, lost, size, moved, numbers = 0.0, 0.0, 0.0, 0, 0
    for parametrized in module.parametrized_weights():
        exact = split_subspace(parametrized.original, rank_of(parametrized))
        base, end = plain[parametrized.matrix.full_name], rounded[parametrized.matrix.full_name]
        change, wanted = end.float() - base, parametrized.delta.dense(parametrized.original).detach()
        lost += float((change - wanted).square().sum())
        size += float(wanted.square().sum())
        moved += int((end != base.bfloat16()).sum())
        numbers += int((wanted != 0).sum())
        worst = max(worst, *leaks(change, exact.u[:, : exact.protected], exact.v[: exact.protected]))
    assert f"up to {worst:.1%} of it is in protected directions" in said
    assert f"in bfloat16 {moved / numbers:.1%} of the changed numbers differ" in said
    assert f"the change is off by {(lost / size) ** 0.5:.1%}" in said
    assert worst > 0.01


def test_where_no_blocks_are_known_the_layers_there_are_get_listed() -> None:
    model = random_model("llama")
    model._no_split_modules = []  # as for OpenAI's first GPT and others
    with pytest.raises(ConfigError, match=r"'all-linear' matches no weight .* outside: .*q_proj"):
        OSFT("unused").choose_trainable(model)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_merged_weights_are_rounded_once_and_read_again_as_they_are(
    train: Callable[..., OSFT], tmp_path: Path, precision: str, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    module = train(precision=precision)
    said = module.export_merged(tmp_path / "merged", module.pretrained.tokenizer, dtype)
    assert ("the change is off by 0.0%" in said) == (dtype == torch.float32)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert read.dtype == dtype
    for parametrized in module.parametrized_weights():
        exact = parametrized.original.detach() + parametrized.delta.dense(parametrized.original).detach()
        assert torch.equal(read.get_parameter(parametrized.matrix.full_name), exact.to(dtype))
    capsys.readouterr()
    module.export(tmp_path / "export", module.pretrained.tokenizer)
    assert ("osft   in bfloat16 " in capsys.readouterr().out) == (precision == "bf16-true")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"unfreeze_rank_ratio": 1.5}, "unfreeze_rank_ratio is 1.5"),
        ({"unfreeze_rank_ratio": 0.0}, "nothing would train"),
        ({"targets": ["lm_head"]}, "model.embed_tokens shares its weight with lm_head"),
        ({"targets": []}, "no weights are named"),
        ({"targets": ""}, "no weights are named"),
        ({"targets": ["embed_tokens"]}, "shares its weight"),
        ({"previous": ["nowhere.safetensors"]}, "nowhere.safetensors cannot be read"),
        ({"targets": ["q_proj", "typo"]}, "'typo' matches no weight"),
        ({"parametrization": "usv", "complement": "thin"}, "thin cannot be used with parametrization usv"),
        ({"rank_bounds": (0.1, 0.5)}, "rank_bounds is for adaptive ranks only"),
        ({"ranks": "adaptive", "rank_bounds": (0.3, 0.5)}, "do not contain unfreeze_rank_ratio 0.25"),
        ({"ranks": "adaptive"}, "adaptive ranks need the training data"),
    ],
)
def test_settings_that_cannot_be_meant(train: Callable[..., OSFT], options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        train(steps=1, **options)


@pytest.mark.parametrize("num_ranks", [7, 8])
def test_work_is_shared_out_by_its_cost(num_ranks: int) -> None:
    layer = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), *[(14336, 4096)] * 2, (4096, 14336)]
    nothing: Any = None  # the cost depends on shapes only
    every = [
        ParametrizedWeight(WeightMatrix("layer", "weight", "mlp", shape, False), nothing, nothing)
        for shape in layer * 32
    ]
    owners = assign_owners([decomposition_cost(parametrized) for parametrized in every], num_ranks)
    loads = [0.0] * num_ranks
    for shape, owner in zip(layer * 32, owners, strict=True):
        loads[owner] += min(shape) ** 2 * max(shape)
    assert max(loads) / (sum(loads) / num_ranks) <= 1.15
