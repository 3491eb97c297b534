"""Model FLOPs beside what torch counts while a model runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lightning_hub.callbacks.flops import FlopsCounter, peak_flops
from lightning_hub.methods.lora.adapters import LoraSettings, inject_adapters
from lightning_hub.ops.batch import IGNORE_INDEX, PackedSequence, StepBatch

TOKENS = 48


def model(**options: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager", **options,
    )  # fmt: skip
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return made


def counted_by_torch(model: PreTrainedModel, ids: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    return int(counter.get_total_flops())


def one_document(trained: int) -> StepBatch:
    ids = torch.randint(3, 96, (TOKENS,), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[: TOKENS - trained] = IGNORE_INDEX
    return StepBatch((PackedSequence.pack([(ids, labels)]),), trained, TOKENS)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_operations_are_those_that_torch_counts(adapters: bool) -> None:
    made = model()
    if adapters:
        inject_adapters(made, LoraSettings(4, 8.0, 0.0, "all-linear", (), False, False, "default"), "base")
        for layer in made.modules():  # peft's own forward, which torch counts layer by layer
            if layer.__class__.__name__ == "FusedLoraLinear":
                layer.lora_B["default"].register_forward_hook(lambda *_: None)  # type: ignore[index, union-attr]
    step = one_document(TOKENS)  # every token is trained, so every logit counts
    found = FlopsCounter.of(made).of_step(step, 1)
    by_torch = counted_by_torch(made, step.rows[0].input_ids)
    config = made.config
    uncausal = config.num_hidden_layers * 6 * TOKENS**2 * config.hidden_size  # eager computes what the mask hides
    if not adapters:
        # The gradient of the embedding's output is computed, that of the ids is not.
        assert found + uncausal == pytest.approx(by_torch, rel=0.01)
    else:
        # The input of the first layer needs no gradient: nothing below it trains.
        assert found + uncausal == pytest.approx(by_torch, rel=0.06)


def test_logits_of_context_are_not_counted() -> None:
    counter = FlopsCounter.of(model())
    every, few = (counter.of_step(one_document(trained), 1) for trained in (TOKENS, 8))
    assert every - few == 6 * 32 * 96 * (TOKENS - 8)


def test_the_peak_of_a_cpu_is_not_known() -> None:
    assert peak_flops(torch.device("cpu")) is None
