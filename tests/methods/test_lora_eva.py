"""Adapters that start at what their layers are given: as peft finds it, the same in every topology, found once."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from torch import Tensor

from lightning_hub.cli import run
from lightning_hub.data.datamodule import ChatData
from lightning_hub.errors import ConfigError
from lightning_hub.methods.lora import LoRA, module
from lightning_hub.models.pretrained import Pretrained
from lightning_hub.ops.attention import PACKED
from lightning_hub.ops.loss import inputs_of
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.metrics import read_metrics
from tests.conftest import WriteRows
from tests.methods.test_lora_liveness import with_experts
from tests.parallel.multiprocess import processes
from tests.parallel.resume_cases import ResumeCase, prepare, run_case, run_cases

LAYERS = ["q_proj", "v_proj", "down_proj"]
STILL = {"init": "eva", "r": 4, "targets": LAYERS, "learning_rate": 1e-30}
"""A step that moves nothing, so that what a training ends with is what it began with."""


def still(topology: str, rows: Path, folder: Path, **options: Any) -> ResumeCase:
    return ResumeCase(topology, rows, folder, kind=LoRA, method=STILL | options, trainer={"max_steps": 1})


def starts(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if ".lora_A." in name}


@pytest.mark.slow
def test_the_start_is_what_peft_finds(tmp_path: Path, write_rows: WriteRows) -> None:
    case = still("single", write_rows(50), tmp_path / "run")
    found = starts(run_case(case).weights)
    data: ChatData = prepare(case)[2]
    data.open(Pretrained(case.model))
    base = Pretrained(case.model).load(dtype=torch.float32, attn_implementation=PACKED)
    rows = [row for index in range(len(data.plan)) for row in data.plan.step(0, index).rows]
    batches = [{**inputs_of(base, row), "labels": row.labels} for row in rows]
    config = LoraConfig(
        r=4, target_modules=LAYERS, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0), task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(base, config)
    initialize_lora_eva_weights(adapted, batches, show_progress_bar=False)
    theirs = starts({name.removeprefix("base_model.model."): one for name, one in adapted.named_parameters()})
    assert found.keys() == theirs.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, theirs[name])
        torch.testing.assert_close(tensor @ tensor.T, torch.eye(4))


@pytest.mark.slow
def test_every_topology_starts_at_the_same(tmp_path: Path, write_rows: WriteRows) -> None:
    rows = write_rows(50)
    alone = starts(run_case(still("single", rows, tmp_path / "alone")).weights)
    stories = [still(name, rows, tmp_path / name) for name in ("ddp", "fsdp", "tp")]
    for result in processes(2, partial(run_cases, stories), tmp_path)[0]:
        assert starts(result.weights).keys() == alone.keys()
        assert all(torch.equal(tensor, alone[name]) for name, tensor in starts(result.weights).items())


@pytest.mark.slow
def test_a_run_that_goes_on_looks_at_nothing_again(
    tmp_path: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(folder: str, *flags: str) -> RunFolder:
        # fmt: off
        assert run([
            "fit", "--run-dir", str(tmp_path / folder), "--trainer.log_every_n_steps", "1", "--trainer.max_steps", "4",
            "--model", "LoRA", "--model.model", "demo", "--model.r", "4", "--model.init", "eva",
            "--data", "ChatData", "--data.train", str(write_rows(40)), "--data.max_seq_len", "64",
            "--data.effective_batch_size", "8", "--checkpoint.every_n_steps", "1", "--checkpoint.keep", "9", *flags,
        ]) == 0
        # fmt: on
        return RunFolder(tmp_path / folder)

    straight = fit("straight")
    monkeypatch.setattr(module, "eva_directions", None)
    resumed = fit("resumed", "--resume", str(straight.checkpoints / "step-2"))
    losses = [[line["loss"] for line in read_metrics(folder) if "loss" in line] for folder in (straight, resumed)]
    assert losses[1] == losses[0][2:]
    assert run(["export", str(straight.path), "--merge"]) == 0
    assert json.loads((straight.export / "adapter_config.json").read_text())["init_lora_weights"] is True


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("experts", {"targets": ["experts"]}, "is for linear layers, not for model.layers.0.mlp.experts"),
        ("experts", {"targets": ["embed_tokens"]}, "is for linear layers, not for model.embed_tokens"),
        ("demo", {"r": 64}, "no packed row has 64 trained tokens"),
        ("demo", {"adapter": "/nowhere"}, "adapter cannot be used with init eva"),
    ],
    ids=["experts", "embeddings", "short rows", "adapter"],
)
def test_what_has_no_directions_is_refused(
    model: str, options: dict[str, Any], said: str, tmp_path: Path, write_rows: WriteRows
) -> None:
    folder = with_experts() if model == "experts" else model
    case = ResumeCase("single", write_rows(50), tmp_path, folder, kind=LoRA, method=STILL | options)
    with pytest.raises(ConfigError, match=said):
        run_case(case)
