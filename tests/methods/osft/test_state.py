"""The state that is computed from shapes is the state that a training holds."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.osft_cost import FORMS, state_gb, with_changes
from benchmarks.strategy_memory import MODELS
from lightning_hub.methods.osft.bases import BasesCache, compute_bases
from lightning_hub.methods.osft.inject import inject_deltas, parametrized_weights
from lightning_hub.methods.targets import resolve_targets
from tests.ops.models import CONFIGS, VOCABULARY


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_what_is_computed_is_what_is_allocated(family: str, form: str, tmp_path: Path) -> None:
    config = deepcopy(CONFIGS[family])
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.requires_grad_(False)
    targets = resolve_targets(model, "all-linear")
    inject_deltas(model, targets, FORMS[form])
    compute_bases(list(parametrized_weights(model, targets)), BasesCache(tmp_path))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(trained)
    ids = torch.randint(3, VOCABULARY, (2, 12))
    model(ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    assert len(gradients) == len(trained)
    held = sum(tensor.untyped_storage().nbytes() for tensor in [*model.parameters(), *gradients, *moments])
    held += sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith("kept"))
    computed, _ = state_gb(with_changes(config, FORMS[form], torch.float32))
    assert computed == pytest.approx(held / 1e9, rel=0.1)


@pytest.mark.slow
def test_the_state_of_a_large_model_is_within_its_bounds() -> None:
    model = MODELS["Llama-3.1-8B"]
    assert state_gb(with_changes(model, FORMS["full"]))[1] < 45
    assert state_gb(with_changes(model, FORMS["thin"]))[0] < 25
