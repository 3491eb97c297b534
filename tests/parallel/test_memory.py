"""What strategies take is what ranks hold."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.strategy_memory import lines
from lightning_hub.errors import ConfigError
from lightning_hub.methods.sft import SFT
from lightning_hub.models.pretrained import Pretrained
from lightning_hub.ops.batch import StepBatch
from lightning_hub.parallel.dtensor import local_tensor
from lightning_hub.parallel.fsdp import FSDPConfig
from lightning_hub.parallel.memory import strategy_memory
from lightning_hub.parallel.strategies import DDP, FSDP, ModelParallel
from tests.parallel.multiprocess import Shares, Topology, make_trainer, processes
from tests.parallel.test_topology import saved

TOPOLOGIES = [
    Topology("ddp x 2", 2, DDP),
    Topology("fsdp x 2", 2, FSDP),
    Topology("tp x 2", 2, partial(ModelParallel, ([1, 2], ["fsdp", "tp"]))),
    Topology("fsdp x 4, two replicas", 4, partial(FSDP, replicas=2)),
    Topology("fsdp 2 x tp 2", 4, partial(ModelParallel, ([2, 2], ["fsdp", "tp"]))),
]

Held = tuple[int, int, int]
"""Bytes of weights, gradients and optimizer state."""


class Weighed(SFT):
    """Notes what this rank holds after a step."""

    held: Held

    def on_train_batch_end(self, outputs: object, batch: StepBatch, batch_idx: int) -> None:
        parameters = list(self.parameters())
        (states,) = (optimizer.state.values() for optimizer in self.trainer.optimizers)
        moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self.held = num_bytes(parameters), num_bytes(gradients), num_bytes(moments)


def num_bytes(tensors: list[Any]) -> int:
    return sum(local_tensor(tensor).nbytes for tensor in tensors)


def weigh(cases: list[tuple[str, Any]], topology: Topology) -> list[Held]:
    found = []
    for model, precision in cases:
        module = Weighed(model)
        trainer: Trainer = make_trainer(topology, max_steps=1, precision=precision, limit_val_batches=0)
        trainer.fit(module, Shares(trainer))
        found.append(module.held)
    return found


def skeleton(model: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with torch.device("meta"):
        return Pretrained(model).skeleton(dtype=dtype, attn_implementation="sdpa")


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda topology: topology.name)
def test_computed_state_is_what_ranks_hold(topology: Topology, tmp_path: Path) -> None:
    models = ["demo", saved("qwen3"), saved("qwen2")]  # tied; odd sizes; biases
    dtypes = {"32-true": torch.float32, "bf16-true": torch.bfloat16}
    cases = [*product(models, ["32-true"]), (models[1], "bf16-true")]
    ranks = processes(topology.world_size, partial(weigh, cases, topology), tmp_path)
    for place, (model, precision) in enumerate(cases):
        memory = strategy_memory(skeleton(model, dtypes[precision]), topology.strategy(), topology.world_size)
        fullest = max((held[place] for held in ranks), key=sum)
        assert (memory.weights, memory.gradients, memory.optimizer) == fullest, f"{model}, {precision}"


BLOCKS, RANKS = 6, 4


def peak(options: dict[str, Any], precision: str, rows: int) -> int:
    """Return the most that rank 0 of four holds in a step, by the order of allocations; nothing is sent."""
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    model = LlamaForCausalLM(config())
    sharding = FSDPConfig(**options)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("fsdp",))
    sharding.apply(model, mesh, precision)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tracker: Any = FSDPMemTracker(model, optimizer)
    ids = torch.arange(16).unsqueeze(0)
    tracker.track_inputs((ids,))

    def run() -> None:
        tracker.reset_mod_stats()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            model(ids, labels=ids, use_cache=False).loss.backward()

    with tracker:
        for _ in range(2):  # the optimizer has its state from the second step on
            for _ in range(rows - 1):
                with sharding.no_gradient_sync(model):
                    run()
            run()
            optimizer.step()
            optimizer.zero_grad()
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


def config() -> LlamaConfig:
    """Blocks of 4 MB and a vocabulary that is small beside them, so that activations weigh little."""
    return LlamaConfig(
        vocab_size=265,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=BLOCKS,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "precision", "rows"),
    [
        ({}, "32-true", 1),
        ({}, "bf16-mixed", 1),
        ({"prefetch": 3}, "32-true", 1),
        ({"reshard_after_forward": False}, "32-true", 1),
        ({"reshard_after_forward": 2}, "32-true", 1),
        ({}, "32-true", 2),
        ({"sync_every_row": True}, "32-true", 2),
    ],
    ids=str,
)
def test_a_step_needs_what_was_computed(options: dict[str, Any], precision: str, rows: int, tmp_path: Path) -> None:
    (measured,) = processes(1, partial(peak, options, precision, rows), tmp_path)
    with torch.device("meta"):
        model = LlamaForCausalLM(config())
    memory = strategy_memory(model, FSDP(**options), RANKS, precision=precision, has_several_rows=rows > 1)
    activations = 4e6
    assert 0.85 * memory.device <= measured <= memory.device + activations


@pytest.mark.slow
def test_the_table_in_the_documents_is_what_is_computed() -> None:
    document = (Path(__file__).parents[2] / "docs/strategies.md").read_text(encoding="utf-8")
    assert "\n".join(lines("bf16-mixed")) in document


def test_what_a_mesh_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes 2 x 2 = 4 processes"):
        strategy_memory(skeleton("demo"), ModelParallel(([2, 2], ["fsdp", "tp"])), 8)
    with pytest.raises(ConfigError, match="does not divide"):
        strategy_memory(skeleton("demo"), ModelParallel(([1, 8], ["fsdp", "tp"])), 8)
