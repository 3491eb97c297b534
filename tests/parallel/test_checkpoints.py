"""Checkpoints that several ranks write: together or not at all, with no more memory than their own parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lightning_hub.checkpoints import checkpoint_io, state_dict
from lightning_hub.checkpoints.checkpoint_io import FolderCheckpointIO
from lightning_hub.checkpoints.storage import Files
from lightning_hub.config.recipe import recipe_from_text
from lightning_hub.config.resolve import fill_defaults
from lightning_hub.config.resolved import ResolvedConfig
from lightning_hub.errors import HubError
from lightning_hub.launch.topology import single_process
from lightning_hub.models.pretrained import EMBEDDED_FOLDER
from lightning_hub.parallel.dtensor import local_tensor
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.manifest import verify
from lightning_hub.training.run import export
from tests.conftest import WriteRows
from tests.parallel.memory_probe import Samples, heaviest_moment, save_heavy_model, weighed
from tests.parallel.multiprocess import processes
from tests.parallel.resume_cases import Outcome, ResumeCase, prepare, run_case
from tests.parallel.test_resume import assert_same


def full_disk_on_rank_1(*args: object) -> Files:
    if torch.distributed.get_rank() == 1:
        raise OSError(28, "No space left on device")
    return {}


def nan_on_rank_1(module: torch.nn.Module) -> None:
    if torch.distributed.get_rank() == 1:
        weight = next(module.parameters())
        local_tensor(weight.detach()).view(-1)[0] = float("nan")


def faults_and_others(story: ResumeCase) -> tuple[list[tuple[str, str]], list[Outcome]]:
    """Fail to save in two ways, then let Lightning's own callback save, and resume from that."""
    trainer, module, data = prepare(story)
    trainer.fit(module, data)
    faults = []

    def refused(work: Callable[[], None]) -> None:
        try:
            work()
        except HubError as error:
            faults.append((error.kind, str(error)))

    target = story.folder / "step-99"
    with mock.patch.object(checkpoint_io, "write_tensors", full_disk_on_rank_1):
        refused(lambda: trainer.save_checkpoint(target))
    nan_on_rank_1(module)
    refused(lambda: trainer.save_checkpoint(target))
    theirs = story.folder / "lightning"
    keeper = ModelCheckpoint(
        dirpath=theirs,
        filename="{step}",
        every_n_train_steps=2,
        save_top_k=2,
        monitor="step",
        mode="max",
        save_last=True,
    )
    quiet = {"every_n_epochs": None}
    whole = ResumeCase("fsdp", story.data, story.folder / "whole", settings=quiet)
    straight = run_case(whole, keeper)
    resumed = ResumeCase("fsdp", story.data, story.folder / "resumed", resume=theirs / "step=8.ckpt", settings=quiet)
    return faults, [straight, run_case(resumed)]


@pytest.mark.slow
@pytest.mark.fault("F18")
def test_ranks_fail_together_and_lightnings_callback_works(tmp_path: Path, write_rows: WriteRows) -> None:
    story = ResumeCase("fsdp", write_rows(50), tmp_path / "run", trainer={"max_steps": 1})
    ranks = processes(2, partial(faults_and_others, story), tmp_path)
    faults = ranks[0][0]
    assert faults == ranks[1][0]
    assert [kind for kind, _ in faults] == ["disk", "nan"]
    assert "No space left on device" in faults[0][1]
    assert "embed_tokens.weight not finite" in faults[1][1]
    assert sorted(path.name for path in story.folder.glob("step-*")) == ["step-1"]
    theirs = story.folder / "lightning"
    assert sorted(path.name for path in theirs.iterdir()) == ["last.ckpt", "step=10.ckpt", "step=8.ckpt"]
    assert [verify(theirs / name).step for name in ("last.ckpt", "step=8.ckpt")] == [10, 8]
    straight = [results[0] for _, results in ranks]
    assert_same([results[1] for _, results in ranks], straight, 8)
    run = RunFolder(tmp_path / "exported")
    run.checkpoints.mkdir(parents=True)
    (theirs / "last.ckpt").rename(run.checkpoints / "step-10")
    export(alone(RECIPE.format(model="demo", data=story.data)), run, run.export)
    exported = load_file(run.export / "model.safetensors")
    assert all(straight[0].weights[name].equal(tensor) for name, tensor in exported.items())


def weigh(story: ResumeCase) -> tuple[Samples, Samples]:
    """Weigh this rank while it saves, and while weights and a new optimizer are filled from that."""
    saving: Samples = []
    filling: Samples = []
    trainer, module, data = prepare(story)
    trainer.fit(module, data)
    with weighed(saving):
        trainer.save_checkpoint(story.folder / "step-2")
    optimizer = torch.optim.AdamW(module.parameters())
    with weighed(filling):
        restored = FolderCheckpointIO().load_checkpoint(story.folder / "step-2")["restored"]
        state_dict.load_weights(module, restored.weights)
        state_dict.load_optimizer_state(module, optimizer, restored.optimizer)
    return saving, filling


RECIPE = """
model: {{class_path: SFT, init_args: {{model: {model}}}}}
data: {{class_path: ChatData, init_args: {{train: {data}, max_seq_len: 64}}}}
trainer: {{devices: 2, strategy: fsdp}}
"""


def alone(text: str) -> ResolvedConfig:
    """Return a recipe as the export of its run reads it."""
    return single_process(ResolvedConfig.of(fill_defaults(recipe_from_text(text, "recipe.yaml"))))


def weigh_export(text: str, run: RunFolder) -> Samples:
    """Weigh this process while it exports what two ranks have saved."""
    exporting: Samples = []
    config = alone(text)
    with weighed(exporting):
        export(config, run, run.export)
    return exporting


@pytest.mark.slow
def test_saving_and_filling_take_little_memory(tmp_path: Path, write_rows: WriteRows) -> None:
    size = save_heavy_model(tmp_path / "model", layers=1)
    AutoTokenizer.from_pretrained(EMBEDDED_FOLDER).save_pretrained(tmp_path / "model")
    trainer = {"max_steps": 1, "limit_val_batches": 0}
    run = RunFolder(tmp_path / "run")
    story = ResumeCase("fsdp", write_rows(50), run.checkpoints, str(tmp_path / "model"), trainer=trainer)
    saving, filling = zip(*processes(2, partial(weigh, story), tmp_path), strict=True)
    assert heaviest_moment([*saving]) <= 0.3 * size
    text = RECIPE.format(model=story.model, data=story.data)
    assert heaviest_moment(processes(1, partial(weigh_export, text, run), tmp_path)) <= 1.3 * size
    assert (run.export / "model.safetensors").stat().st_size == pytest.approx(size, rel=0.01)
    moments = 2 * size  # are the new optimizer's own
    assert size <= heaviest_moment([*filling]) <= moments + 0.3 * size
