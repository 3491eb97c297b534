from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedModel

from lightning_hub.errors import ConfigError
from lightning_hub.methods.targets import WeightMatrix, reject_tied_weights, resolve_targets, weight_matrices
from tests.ops.models import CONFIGS, SHAPE

MIXTRAL = MixtralConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=1)


def model(family: str) -> PreTrainedModel:
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(MIXTRAL if family == "mixtral" else CONFIGS[family])
    return made


def ends(found: list[WeightMatrix]) -> set[str]:
    return {matrix.name.rpartition(".")[2] for matrix in found}


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("family", "targets", "names"),
    [
        ("llama", "all-linear", ATTENTION | MLP),
        ("llama", ["attention"], ATTENTION),
        ("llama", ["mlp"], MLP),
        ("llama", ["q_proj", "mlp.up_proj"], {"q_proj", "up_proj"}),
        ("llama", [r".*layers\.1\.self_attn\.[qk]_proj"], {"q_proj", "k_proj"}),
        ("llama", ["embed_tokens"], {"embed_tokens"}),
        ("gpt2", "all-linear", {"c_attn", "c_proj", "c_fc"}),
        ("mixtral", "all-linear", ATTENTION),
        ("mixtral", ["experts"], {"gate_up_proj", "down_proj"}),
        ("mixtral", ["router"], {"gate"}),
        ("gpt-oss, sinks", ["experts"], {"gate_up_proj", "down_proj"}),
        ("gpt-oss, sinks", ["router"], {"router"}),
    ],
)
def test_targets_mean_what_they_say(family: str, targets: str | list[str], names: set[str]) -> None:
    assert ends(resolve_targets(model(family), targets)) == names


def test_a_pattern_takes_whole_names_only() -> None:
    (found,) = resolve_targets(model("llama"), [r"model\.layers\.1\.self_attn\.q_proj"])
    assert found.full_name == "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("targets", [["q_proj", "nope"], ["experts"], ["(q_proj"], ["q_pro"]])
def test_an_entry_that_matches_nothing_is_refused_with_the_names_there_are(targets: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve_targets(model("llama"), targets)
    if "(" not in targets[0]:
        assert "attention: q_proj, k_proj, v_proj, o_proj; mlp: gate_proj" in str(refused.value)


@pytest.mark.parametrize("targets", ["", []])
def test_no_target_at_all_is_refused(targets: str | list[str]) -> None:
    with pytest.raises(ConfigError, match=r"targets: no weights are named; .*the model has outside: embed_tokens"):
        resolve_targets(model("llama"), targets)


@pytest.mark.parametrize("target", ["lm_head", r".*lm_head", r".*embed_tokens"])
def test_a_shared_weight_is_found_under_each_of_its_names(target: str) -> None:
    with torch.device("meta"):
        tied = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    (found,) = resolve_targets(tied, target)
    assert (found.full_name, found.tied_names) == ("model.embed_tokens.weight", ("lm_head.weight",))
    with pytest.raises(ConfigError, match=r"model\.embed_tokens shares its weight with lm_head"):
        reject_tied_weights([found], "leave it out")


def test_what_is_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'attention' and 'q_proj' both name model\.layers\.0\.self_attn\.q_proj"):
        resolve_targets(model("llama"), ["attention", "q_proj"])


@pytest.mark.parametrize("family", [*CONFIGS, "mixtral"])
def test_every_matrix_is_found_once(family: str) -> None:
    made = model(family)
    expected = {name for name, parameter in made.named_parameters() if parameter.ndim > 1 and "bias" not in name}
    found = [matrix.full_name for matrix in weight_matrices(made)]
    assert len(found) == len(set(found))
    assert expected <= set(found)
    assert {matrix.group for matrix in weight_matrices(made) if matrix.module.startswith("model.layers")} <= {
        "attention",
        "mlp",
        "experts",
        "router",
    }


def test_layers_that_are_stored_transposed_are_known() -> None:
    assert all(matrix.is_transposed for matrix in resolve_targets(model("gpt2"), "all-linear"))
