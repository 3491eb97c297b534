"""What is proven about models, and what is not let through."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import HalfPrecision
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from lightning_hub.errors import ConfigError
from lightning_hub.ops import attention_proof, reference
from lightning_hub.ops.attention import PACKED
from lightning_hub.ops.attention_proof import apply_capabilities, capabilities_of, prove_attention, proven_loss
from lightning_hub.ops.batch import PackedSequence
from lightning_hub.ops.loss import CausalLMLoss, ModelCapabilities, inputs_of
from lightning_hub.ops.miniature import NoMiniatureError
from lightning_hub.runs.folder import default_cache_dir
from tests.ops.models import CONFIGS, LEAKING, SHAPE, documents, make


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(attention_proof, "_proven", {})


def llama(**changes: Any) -> LlamaConfig:
    config = deepcopy(CONFIGS["llama"])
    assert isinstance(config, LlamaConfig)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


class Shifting(LlamaForCausalLM):
    """Mixes each token with the one before it, across the boundaries of documents."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        embedded = self.get_input_embeddings()(input_ids)
        shifted = nn.functional.pad(embedded, (0, 0, 1, 0))[:, :-1]
        return super().forward(inputs_embeds=embedded + 0.01 * shifted, **kwargs)


class Forgetful(LlamaForCausalLM):
    """Leaves out the positions, by which transformers knows packed documents, and our boundaries."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, use_cache=False)


class Peeking(LlamaForCausalLM):
    """Adds a hundredth of what the next token is."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        embedded = self.get_input_embeddings()(input_ids)
        return super().forward(inputs_embeds=embedded + 0.01 * embedded.roll(-1, dims=1), **kwargs)


class Scaling(LlamaForCausalLM):
    """Makes its logits a little larger behind the head."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.001
        return output


class Noisy(LlamaForCausalLM):
    """Gives other logits each time."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 0.01 * torch.randn_like(output.logits)
        return output


class EvaluatingModel(LlamaModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training and kwargs.get("boundaries"):
            kwargs["boundaries"] = (0, kwargs["boundaries"][-1])
        return super().forward(*args, **kwargs)


class Evaluating(LlamaForCausalLM):
    """Sees the whole row in evaluation only."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = EvaluatingModel(config)


def proven_head_of(model: PreTrainedModel, proven: ModelCapabilities) -> CausalLMLoss:
    return CausalLMLoss(model, capabilities=apply_capabilities(model, proven))


@pytest.mark.parametrize("family", CONFIGS)
def test_families_that_keep_documents_apart_are_packed(family: str) -> None:
    model = make(family, PACKED)
    assert capabilities_of(model).isolates_documents
    assert capabilities_of(model).attention == PACKED


@pytest.mark.parametrize("family", LEAKING)
def test_families_that_do_not_are_run_one_by_one(family: str) -> None:
    config = LEAKING[family]
    model = make(family, "eager")
    proven = prove_attention(type(model), config, PACKED)
    assert not proven.isolates_documents
    assert proven.attention in ("sdpa", "eager")
    assert "packed in a row" in proven.reason


@pytest.mark.parametrize(("kind", "requested"), [(Shifting, PACKED), (Forgetful, PACKED), (Forgetful, "sdpa")])
def test_classes_of_ones_own_are_proven_too(kind: type[PreTrainedModel], requested: str) -> None:
    config = llama()
    proven = prove_attention(kind, config, requested)
    assert (proven.attention, proven.isolates_documents) == ("sdpa", False)
    config._attn_implementation = proven.attention
    torch.manual_seed(0)
    model = kind(config)
    row = PackedSequence.pack(documents(7, 1, 12, 5))
    head = proven_loss(model)
    assert head(row).item() == pytest.approx(sum(head(document).item() for document in row.documents()), rel=1e-6)


def test_evaluation_is_proven_as_well() -> None:
    assert not prove_attention(Evaluating, llama(), PACKED).isolates_documents


@pytest.mark.parametrize("attention", [PACKED, "sdpa"])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_follow_the_longest_document(kind: str, attention: str) -> None:
    """The longest document of a row says how the others are rotated, from a length on."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0, 4.0, 5.0, 6.0], "original_max_position_embeddings": 8}
    sizes = {**SHAPE, "max_position_embeddings": 8 if kind == "dynamic" else 32}
    config = LlamaConfig(**sizes, rope_parameters=rope)
    proven = prove_attention(LlamaForCausalLM, config, attention)
    assert (proven.attention, proven.isolates_documents, proven.max_document_length) == (
        attention,
        True,
        7 if kind == "dynamic" else 8,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    plain, ours = LlamaForCausalLM(config), LlamaForCausalLM(deepcopy(config))
    for parameter in plain.parameters():
        parameter.data *= 10
    ours.load_state_dict(plain.state_dict())
    head = proven_head_of(ours, proven)
    for lengths in ((5, 7, 3), (5, 12, 3), (5, 7, 3)):
        row = PackedSequence.pack(documents(*lengths))
        expected = proven_head_of(plain, replace(proven, attention="eager", isolates_documents=False))(row)
        assert head(row).item() == pytest.approx(expected.item(), rel=1e-5)
    row, whole = PackedSequence.pack(documents(5, 12, 3)), replace(proven, max_document_length=None)
    expected = proven_head_of(plain, replace(proven, attention="eager", isolates_documents=False))(row)
    packed = proven_head_of(ours, whole)(row)
    assert packed.item() != pytest.approx(expected.item(), rel=1e-4), "the row could be packed"


def test_a_head_with_something_behind_it_is_not_fused() -> None:
    assert prove_attention(LlamaForCausalLM, llama(), PACKED).has_linear_head
    assert not prove_attention(Scaling, llama(), PACKED).has_linear_head


def test_what_stands_in_the_place_of_the_head_is_not_fused() -> None:
    proven = prove_attention(LlamaForCausalLM, llama(), PACKED)

    class Other(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    model = make("llama", PACKED)
    assert apply_capabilities(model, proven).has_linear_head
    model.lm_head = Other(32, 61)
    assert not apply_capabilities(model, proven).has_linear_head
    model = make("llama", PACKED)
    head = model.get_output_embeddings()
    assert head is not None
    head.register_forward_hook(lambda *given: given[-1] * 2)
    assert not apply_capabilities(model, proven).has_linear_head


@pytest.mark.parametrize(
    ("kind", "config", "requested", "sentence"),
    [
        (Peeking, llama(), PACKED, "not causal"),
        (BertLMHeadModel, BertConfig(), PACKED, "not causal"),
        (Noisy, llama(), PACKED, "random"),
        (BloomForCausalLM, LEAKING["bloom, positions in its mask"], "sdpa", "sdpa does not give the numbers"),
        pytest.param(
            LlamaForCausalLM,
            llama(),
            "flex_attention",
            "flex_attention does not give the numbers",  # it has no backward on a CPU
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_wrong_in_every_way_is_refused(
    kind: type[PreTrainedModel], config: PretrainedConfig, requested: str, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        prove_attention(kind, config, requested)


def test_a_model_that_cannot_be_made_small_runs_as_its_own_attention_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object) -> None:
        raise NoMiniatureError("its sizes are written in its code")

    monkeypatch.setattr(attention_proof, "small_config", fails)
    proven = prove_attention(LlamaForCausalLM, llama(), PACKED)
    assert (proven.attention, proven.isolates_documents, proven.has_linear_head, proven.is_proven) == (
        "eager",
        False,
        False,
        False,
    )
    assert "its sizes are written in its code" in proven.reason
    assert not apply_capabilities(make("llama", "eager"), proven).isolates_documents
    with pytest.raises(ConfigError, match="cannot be compared"):
        prove_attention(LlamaForCausalLM, llama(), "sdpa")
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match="not causal"):
        apply_capabilities(Peeking(llama()), proven)


def test_a_configuration_that_is_not_whole_is_refused() -> None:
    """No number of experts a token is the default of this family, with which it fails at its first forward."""
    config = DeepseekV2Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, q_lora_rank=8, kv_lora_rank=8,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    proven = prove_attention(DeepseekV2ForCausalLM, config, PACKED)
    with pytest.raises(ConfigError, match="fails on documents"):
        apply_capabilities(DeepseekV2ForCausalLM(config), proven)


def test_further_terms_of_a_models_own_loss_are_known() -> None:
    sizes = {**SHAPE, "num_local_experts": 4}
    assert not prove_attention(MixtralForCausalLM, MixtralConfig(**sizes), PACKED).adds_to_loss
    routed = MixtralConfig(**sizes, output_router_logits=True, router_aux_loss_coef=0.5)
    assert prove_attention(MixtralForCausalLM, routed, PACKED).adds_to_loss


def test_a_proof_is_found_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proven = prove_attention(LlamaForCausalLM, llama(), PACKED)
    (file,) = (tmp_path / "proofs").iterdir()
    find, runs = attention_proof._find, []

    def counted(*given: Any) -> ModelCapabilities:
        runs.append(given)
        return find(*given)

    monkeypatch.setattr(attention_proof, "_find", counted)
    monkeypatch.setattr(attention_proof, "_proven", {})
    assert prove_attention(LlamaForCausalLM, llama(), PACKED) == proven
    assert not runs
    prove_attention(LlamaForCausalLM, llama(rms_norm_eps=1e-5), PACKED)
    prove_attention(LlamaForCausalLM, llama(), "sdpa")
    prove_attention(Scaling, llama(), PACKED)
    assert len(runs) == 3
    file.write_text("{")
    monkeypatch.setattr(attention_proof, "_proven", {})
    assert prove_attention(LlamaForCausalLM, llama(), PACKED) == proven
    assert len(runs) == 4


def test_a_proof_leaves_no_trace() -> None:
    config, state = llama(), torch.get_rng_state()
    before = config.to_dict()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert prove_attention(LlamaForCausalLM, config, PACKED).isolates_documents
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert config.to_dict() == before


@pytest.mark.parametrize("state", ["bfloat16 by default", "inference", "autocast", "lower precision"])
def test_a_proof_is_the_same_whatever_the_process_is_at(state: str) -> None:
    contexts: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "bfloat16 by default": lambda: HalfPrecision("bf16-true").module_init_context(),
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "lower precision": nullcontext,
    }
    expected = prove_attention(LlamaForCausalLM, llama(), PACKED)
    attention_proof._proven.clear()
    shutil.rmtree(default_cache_dir())
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    torch.set_float32_matmul_precision("medium" if state == "lower precision" else precision)
    with contexts[state]():
        found = prove_attention(LlamaForCausalLM, llama(), PACKED)
    torch.set_float32_matmul_precision(precision)
    assert found == expected
    assert found.isolates_documents
    assert torch.get_default_dtype() == dtype


def test_the_proof_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boundaries that are one token off are noticed."""

    def wrong(model: PreTrainedModel, row: PackedSequence, packed: bool = True) -> dict[str, Any]:
        inputs = inputs_of(model, row, packed)
        if "boundaries" in inputs:
            start, first, *others = inputs["boundaries"]
            inputs["boundaries"] = (start, first + 1, *others)
        return inputs

    assert prove_attention(LlamaForCausalLM, llama(), PACKED).isolates_documents
    monkeypatch.setattr(reference, "inputs_of", wrong)
    monkeypatch.setattr(attention_proof, "_proven", {})
    monkeypatch.setattr(attention_proof, "_read_cached", lambda key: None)
    assert not prove_attention(LlamaForCausalLM, llama(), PACKED).isolates_documents
