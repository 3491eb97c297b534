"""Adapters beside weights in four and eight bits, where bitsandbytes is installed; its CPU kernels will do."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from lightning_hub.errors import ConfigError
from lightning_hub.methods.lora import LoRA, quantization
from lightning_hub.methods.lora.quantization import Quantization
from lightning_hub.models.pretrained import Pretrained
from lightning_hub.ops.attention import PACKED
from tests.methods.test_lora import SMALL, peft_loop, train
from tests.parallel.multiprocess import Case, calm, trained
from tests.parallel.test_topology import ONE

installed = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")

KINDS: list[Quantization] = ["nf4", "int8"]


def stock(kind: Quantization) -> PreTrainedModel:
    """Return a quantized model as the manuals of transformers and peft make one."""
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if kind == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    )
    model = AutoModelForCausalLM.from_pretrained(
        calm(), dtype=torch.float32, attn_implementation=PACKED, quantization_config=config, device_map="cpu"
    )
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]
    for module in model.modules():
        setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # see load_quantized
    model.train()  # int8 layers compute otherwise where they need not train
    return model


@installed
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_adapters_are_those_of_stock_libraries(kind: Quantization) -> None:
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=names)
    losses, weights = peft_loop(stock(kind), config)
    options = {**SMALL, "quantization": kind}
    seen = trained(Case("lora", method=LoRA, model=calm(), options=options), ONE)
    assert seen.losses == pytest.approx(losses, rel=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(seen.weights[name.removeprefix("base_model.model.")], weight, rtol=1e-4, atol=1e-6)
    often = {"val_check_interval": 2}
    validated = trained(Case("lora", method=LoRA, model=calm(), options=options, trainer=often), ONE)
    assert validated.losses == seen.losses, "looking at a model leaves its weights as they are"
    plain = trained(Case("lora", method=LoRA, model=calm(), options=SMALL), ONE)
    assert abs(plain.losses[0] - losses[0]) > 1e-5, "the weights were rounded"


@installed
@pytest.mark.parametrize("kind", KINDS)
def test_the_export_is_an_adapter_for_the_whole_weights(kind: Quantization, tmp_path: Path) -> None:
    train(calm(), tmp_path, quantization=kind, gradient_checkpointing=True)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert "quantization" not in (tmp_path / "adapter" / "adapter_config.json").read_text()


def test_an_adapter_is_not_quantized_with_its_base(tmp_path: Path) -> None:
    train(calm(), tmp_path)
    given = Pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ConfigError, match="an adapter folder cannot be quantized"):
        quantization.load_quantized(given, "nf4", torch.float32, PACKED, torch.device("cpu"))


@installed
def test_what_needs_the_weights_themselves_is_refused() -> None:
    with pytest.raises(ConfigError, match="init olora changes the base weights, which nf4 has rounded"):
        LoRA("demo", quantization="nf4", init="olora")
    options = {**SMALL, "quantization": "nf4", "modules_to_save": ["o_proj"]}
    with pytest.raises(ConfigError, match="'o_proj' is quantized, so its weights cannot be trained"):
        trained(Case("lora", method=LoRA, model=calm(), options=options), ONE)


def test_without_the_library_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"nf4 weights need the library bitsandbytes; install lightning-hub\[gpu\]"):
        LoRA("demo", quantization="nf4")
