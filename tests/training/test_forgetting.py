"""The loss on old tasks: the number itself, where it goes, and that measuring it changes nothing."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from lightning_hub.callbacks.forgetting import Forgetting
from lightning_hub.data.datamodule import ChatData
from lightning_hub.demo.tasks import SPELL, conversations
from lightning_hub.methods.sft import SFT
from lightning_hub.models.pretrained import Pretrained
from lightning_hub.ops.batch import IGNORE_INDEX
from lightning_hub.parallel.strategies import DDP, FSDP
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.metrics import read_metrics
from tests.conftest import WriteRows
from tests.parallel.multiprocess import Topology, make_trainer, processes
from tests.training.conftest import Fit

ONE = Topology("one process", 1, partial(str, "auto"))


@pytest.fixture
def old(write_rows: WriteRows) -> Path:
    return write_rows([dict(row) for row in conversations((SPELL,), 21, seed=8)], name="old.jsonl")


def recipe(tmp_path: Path, old: Path | str) -> str:
    """Return a file that adds the callback to a recipe."""
    path = tmp_path / "also.yaml"
    callback = {"class_path": "Forgetting", "init_args": {"eval_also": {"spell": str(old), "both": [str(old)] * 2}}}
    path.write_text(json.dumps({"trainer": {"callbacks": [callback]}}))
    return str(path)


@pytest.mark.slow
def test_it_stands_beside_the_validation_loss(fit: Fit, tmp_path: Path, old: Path) -> None:
    flags = ("--trainer.max_epochs", "2", "--trainer.logger", "CSVLogger")
    code, folder = fit("--config", recipe(tmp_path, old), *flags)
    assert code == 0
    losses, both = (series(folder, name) for name in ("forgetting/spell", "forgetting/both"))
    assert list(losses) == [0, *series(folder, "val_loss")] == [0, 4, 8]
    assert list(both.values()) == pytest.approx(list(losses.values()))
    assert losses[0] == pytest.approx(reference(old), rel=1e-5)
    assert losses[0] < 0.1 < losses[8]
    logged = next(folder.path.rglob("metrics.csv")).read_text()
    assert "forgetting/spell" in logged.splitlines()[0]


def series(folder: RunFolder, name: str) -> dict[int, float]:
    """Return a metric by step."""
    return {int(str(line["step"])): float(str(line[name])) for line in read_metrics(folder) if name in line}


def reference(old: Path) -> float:
    """The loss of the embedded model, one document after another, by transformers and torch alone."""
    demo = Pretrained("demo")
    samples = ChatData(train=str(old), max_seq_len=64).open(demo).train
    model = demo.load(dtype=torch.float32, attn_implementation="eager")
    total, count = 0.0, 0
    with torch.no_grad():
        for sample in range(len(samples)):
            ids, labels = (torch.from_numpy(part.astype("int64")) for part in samples[sample])
            logits = model(ids[None], use_cache=False).logits[0, :-1]
            total += float(cross_entropy(logits.double(), labels[1:], reduction="sum"))
            count += int((labels[1:] != IGNORE_INDEX).sum())
    return total / count


@pytest.mark.slow
def test_measuring_changes_no_weight(fit: Fit, tmp_path: Path, old: Path) -> None:
    noisy = ("--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--model.neftune_alpha", "5")
    _, plain = fit(*noisy, folder="plain")
    _, watched = fit("--config", recipe(tmp_path, old), *noisy, folder="watched")
    first, second = (load_file(folder.export / "model.safetensors") for folder in (plain, watched))
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


def test_without_validation_it_measures_the_beginning_and_the_end(fit: Fit, tmp_path: Path, old: Path) -> None:
    _, folder = fit("--config", recipe(tmp_path, old), "--trainer.max_steps", "3", val="null")
    assert list(series(folder, "forgetting/spell")) == [0, 3]


@pytest.mark.parametrize("missing", ["/nowhere/rows.jsonl", "/nowhere/*.jsonl", ""])
def test_data_that_is_not_there_is_named_by_its_option(
    missing: str, fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = fit("--config", recipe(tmp_path, missing))
    assert code == 2
    assert "Forgetting.eval_also.spell: " in capsys.readouterr().err


def test_no_data_at_all_is_refused(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.callbacks+=Forgetting", "--trainer.callbacks.0.eval_also", "{}")[0] == 2
    assert "Forgetting.eval_also: no data is named" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [DDP, FSDP])
def test_ranks_share_the_rows_and_agree(strategy: type, tmp_path: Path, old: Path, write_rows: WriteRows) -> None:
    rows = write_rows(24)
    alone = measured(ONE, rows, old)
    together = processes(2, partial(measured, Topology("two", 2, strategy), rows, old), tmp_path)
    assert together[0] == together[1]
    assert together[0] == pytest.approx(alone, rel=1e-4)


def measured(topology: Topology, rows: Path, old: Path) -> list[float]:
    """Train one epoch and return what was measured, on this rank."""
    seen: list[float] = []
    callback = Forgetting({"spell": str(old)})
    callback.write = lambda step, values: seen.extend(values.values())
    torch.manual_seed(0)
    trainer = make_trainer(topology, callbacks=[callback])
    data = ChatData(train=str(rows), val=str(old), max_seq_len=64, effective_batch_size=8)
    trainer.fit(SFT("demo", learning_rate=3e-4), datamodule=data)
    return seen
