"""Memory of strategies on each device for models of 1, 8 and 70 billion parameters, as a table in Markdown.

Nothing is downloaded or allocated: the dimensions are written out, the models have no memory, and
``parallel/memory.py`` computes from shapes. Activations and logits are not in it.

usage: python -m benchmarks.strategy_memory [--precision bf16-mixed]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from lightning.pytorch.strategies import Strategy
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lightning_hub.parallel.memory import Memory, strategy_memory
from lightning_hub.parallel.strategies import DDP, FSDP, ModelParallel

GIB = 2**30
PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}
"""The dtype of the weights under each precision."""

VOCABULARY = 128_256


def llama(hidden: int, inner: int, layers: int, heads: int, *, tied: bool) -> LlamaConfig:
    """Return the configuration of a model of the Llama 3 family, which has 8 key-value heads in every size."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=hidden // heads,
        tie_word_embeddings=tied,
    )


MODELS = {
    "Llama-3.2-1B": llama(2048, 8192, 16, 32, tied=True),
    "Llama-3.1-8B": llama(4096, 14_336, 32, 32, tied=False),
    "Llama-3.1-70B": llama(8192, 28_672, 80, 64, tied=False),
}


@dataclass(frozen=True)
class Layout:
    """A strategy on a number of devices."""

    name: str
    devices: int
    strategy: Callable[[], Strategy | str]


def mesh(fsdp: int, tp: int) -> Layout:
    """Return a layout of ``model_parallel``."""
    name = f"model_parallel, fsdp {fsdp} x tp {tp}"
    return Layout(name, fsdp * tp, lambda: ModelParallel(([fsdp, tp], ["fsdp", "tp"])))


def fsdp(devices: int) -> Layout:
    """Return a layout that shards over all devices."""
    return Layout("fsdp", devices, FSDP)


REPLICAS = Layout("fsdp, 8 replicas", 64, lambda: FSDP(replicas=8))

LAYOUTS = {
    "Llama-3.2-1B": [Layout("one process", 1, lambda: "auto"), Layout("ddp", 8, DDP), fsdp(8)],
    "Llama-3.1-8B": [
        Layout("one process", 1, lambda: "auto"),
        Layout("ddp", 8, DDP),
        *(fsdp(devices) for devices in (8, 16, 64)),
        REPLICAS,
        mesh(4, 2),
    ],
    "Llama-3.1-70B": [*(fsdp(devices) for devices in (8, 16, 64)), REPLICAS, mesh(2, 8), mesh(8, 8)],
}
"""What makes sense to ask for."""


def lines(precision: str) -> Iterator[str]:
    """Yield the table, line by line."""
    yield "| Model | Strategy | Devices | Weights | Gradients | Optimizer | At work | Sum | Sum, several rows a step |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, config in MODELS.items():
        model = skeleton(config, PRECISIONS[precision])
        for layout in LAYOUTS[name]:
            one, several = (memory(model, layout, precision, has_several_rows=more) for more in (False, True))
            parts = one.weights, one.gradients, one.optimizer, one.at_work, one.device, several.device
            cells = " | ".join(f"{part / GIB:.1f}" for part in parts)
            yield f"| {name} | {layout.name} | {layout.devices} | {cells} |"


def memory(model: PreTrainedModel, layout: Layout, precision: str, *, has_several_rows: bool) -> Memory:
    """Compute one row."""
    made = layout.strategy()
    return strategy_memory(model, made, layout.devices, precision=precision, has_several_rows=has_several_rows)


def skeleton(config: LlamaConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model without memory."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=list(PRECISIONS), default="bf16-mixed")
    for line in lines(parser.parse_args().precision):
        print(line)


if __name__ == "__main__":
    main()
