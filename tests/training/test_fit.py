"""The main job, from the command line to the export."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_hub.cli import run
from lightning_hub.methods import causal_lm
from lightning_hub.models.pretrained import EMBEDDED_FOLDER
from lightning_hub.ops.loss import ModelCapabilities
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.metrics import Line, read_metrics
from tests.conftest import WriteRows
from tests.training.conftest import Fit
from tests.warm import warm_run

CONFIGS = Path(__file__).parents[2] / "configs"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def series(lines: list[Line], name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in lines if name in line]  # type: ignore[misc]


def test_a_run_leaves_what_the_contract_says(fit: Fit) -> None:
    code, folder = fit("--trainer.max_epochs", "2", "--trainer.num_sanity_val_steps=-1")
    assert code == 0
    status = read(folder.status)
    assert (status["state"], status["step"], status["max_steps"], status["exit_code"]) == ("finished", 8, 8, 0)
    assert read(folder.run_json)["method"] == "sft"
    report = read(folder.data_report)
    assert report["rows_read"] == report["rows_kept"] + sum(report["dropped"].values()) == 40
    assert 0 < report["packing"]["fill"] <= 1
    lines = read_metrics(folder)
    assert [step for step, _ in series(lines, "loss")] == list(range(1, 9))
    assert [step for step, _ in series(lines, "val_loss")] == [0, 4, 8]
    assert series(lines, "val_loss")[-1][1] < series(lines, "val_loss")[0][1]
    assert {"lr", "grad_norm", "tokens", "loss_tokens", "tokens_per_second", "step_time", "epoch"} <= set(lines[-2])
    assert read(folder.rank(1, 0).heartbeat)["phase"] == "exit"
    assert folder.path.stat().st_mode & 0o777 == 0o700
    open_to_others = [path for path in folder.path.rglob("*") if path.lstat().st_mode & 0o077 and not path.is_symlink()]
    assert open_to_others == []


def test_the_export_answers_as_the_trained_module(trained: RunFolder) -> None:
    folder = trained
    model = AutoModelForCausalLM.from_pretrained(folder.export, dtype=torch.float32)
    again = AutoModelForCausalLM.from_pretrained(folder.export, dtype=torch.float32)
    weights = load_file(folder.latest / "weights.safetensors")
    own = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    assert again.load_state_dict(own, strict=False).missing_keys == ["lm_head.weight"], "tied ones are written once"
    ids = torch.arange(5, 60).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder.export)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(EMBEDDED_FOLDER).chat_template
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.slow
def test_the_export_command_writes_the_same(trained: RunFolder, tmp_path: Path) -> None:
    assert run(["export", str(trained.path), "--to", str(tmp_path / "again")]) == 0
    first, again = (path / "model.safetensors" for path in (trained.export, tmp_path / "again"))
    assert load_file(first).keys() == load_file(again).keys()
    assert all(torch.equal(load_file(first)[name], tensor) for name, tensor in load_file(again).items())


@pytest.mark.slow
def test_ranks_with_parts_of_a_model_say_what_rounding_has_done(
    fit: Fit, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_HUB_CACHE", str(tmp_path / "cache"))
    command = partial(warm_run, tmp_path)
    two = ("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "fsdp")
    code, _ = fit(*two, "--trainer.precision", "bf16-true", "--trainer.max_steps", "2", method="OSFT", command=command)
    seen = capfd.readouterr()
    assert code == 0, seen.err
    assert "osft   in bfloat16 " in seen.out


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["validate", "test"])
def test_nothing_to_measure_on_is_refused(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    _, folder = fit("--trainer.max_steps", "1", val="null")
    capsys.readouterr()
    assert run([verb, "--config", str(folder.config)]) == 2
    assert "data.init_args.val: there is no validation data" in capsys.readouterr().err


@pytest.mark.parametrize("taken", ["file", "folder", "run"])
def test_an_export_is_written_over_nothing(
    trained: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], taken: str
) -> None:
    folder = trained
    there = {"file": tmp_path / "data.jsonl", "folder": tmp_path / "model", "run": folder.path}[taken]
    if taken == "folder":
        there.mkdir()
    if taken != "run":
        (there / "config.json" if taken == "folder" else there).write_text("{}")
    before = sorted(path for path in there.parent.rglob("*") if path.name != "lock")
    capsys.readouterr()
    assert run(["export", str(folder.path), "--to", str(there)]) == 2
    assert f"{there} is there already" in capsys.readouterr().err
    assert sorted(path for path in there.parent.rglob("*") if path.name != "lock") == before


def test_an_export_below_a_file_is_refused(
    trained: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run(["export", str(trained.path), "--to", str(tmp_path / "file/export")]) == 2
    assert f"{tmp_path / 'file'} is not a folder" in capsys.readouterr().err


def test_an_export_leaves_its_neighbours_alone(trained: RunFolder, tmp_path: Path) -> None:
    folder = trained
    for name in ("model.old", "model.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    (tmp_path / "model").mkdir()
    assert run(["export", str(folder.path), "--to", str(tmp_path / "model")]) == 0
    assert all((tmp_path / name / "mine").exists() for name in ("model.old", "model.tmp"))
    assert not list(tmp_path.glob(".model*"))


@pytest.mark.slow
def test_zero_steps_prepare_check_and_export(fit: Fit) -> None:
    code, folder = fit("--trainer.max_steps", "0")
    assert code == 0
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED_FOLDER, dtype=torch.float32).state_dict()
    exported = AutoModelForCausalLM.from_pretrained(folder.export, dtype=torch.float32).state_dict()
    assert all(torch.equal(base[name], tensor) for name, tensor in exported.items())


@pytest.mark.slow
def test_config_yaml_repeats_the_run(trained: RunFolder, tmp_path: Path) -> None:
    folder = trained
    assert run(["fit", "--config", str(folder.config), "--run-dir", str(tmp_path / "again")]) == 0
    first, again = (load_file(path / "export/model.safetensors") for path in (folder.path, tmp_path / "again"))
    assert all(torch.equal(first[name], tensor) for name, tensor in again.items())
    assert folder.config.read_text() == (tmp_path / "again/config.yaml").read_text()


def test_print_config_is_the_config_of_the_run(trained: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained
    assert run(["fit", "--config", str(folder.config), "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == yaml.safe_load(folder.config.read_text())
    assert printed["model"]["init_args"]["betas"] == [0.9, 0.95]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_runs(recipe: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    # fmt: off
    assert run([
        "fit", "--config", str(recipe), "--run-dir", str(tmp_path / "run"), "--data.train", str(write_rows(60)),
        "--trainer.max_steps", "2",
    ]) == 0
    # fmt: on


FLAGS: dict[str, tuple[list[str], int]] = {
    "max_steps": (["--trainer.max_steps", "3"], 3),
    "limit_train_batches": (["--trainer.limit_train_batches", "2", "--trainer.max_epochs", "2"], 4),
    "tokens_per_step": (["--data.tokens_per_step", "128", "--data.effective_batch_size", "null"], 8),
    "gradient clipping by value": (
        ["--trainer.gradient_clip_val", "0.01", "--trainer.gradient_clip_algorithm=value"],
        4,
    ),
    "one bf16 row of bf16 weights": (["--trainer.precision", "bf16-true"], 4),
    "much at once": (
        [
            "--trainer.precision=bf16-mixed",
            "--model.gradient_checkpointing=true",
            "--model.attn_implementation=sdpa",
            "--model.label_smoothing=0.1",
            "--model.neftune_alpha=5",
            "--model.lr_scheduler=wsd",
            "--model.warmup_ratio=0.1",
        ],
        4,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FLAGS)
def test_flags_keep_their_meaning(fit: Fit, case: str) -> None:
    flags, steps = FLAGS[case]
    code, folder = fit(*flags)
    assert code == 0
    assert read(folder.status)["step"] == steps


@pytest.mark.slow
def test_overfitting_sees_the_same_step_again(fit: Fit) -> None:
    _, folder = fit("--trainer.overfit_batches", "1", "--trainer.max_epochs", "3", "--model.learning_rate", "1e-9")
    losses = [value for _, value in series(read_metrics(folder), "loss")]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


def test_a_trial_leaves_no_result(fit: Fit) -> None:
    code, folder = fit("--trainer.fast_dev_run", "true")
    assert code == 0
    assert not folder.export.exists()
    assert not list(folder.checkpoints.iterdir())


def test_validation_in_mid_epoch(fit: Fit) -> None:
    _, folder = fit("--trainer.val_check_interval", "2")
    assert [step for step, _ in series(read_metrics(folder), "val_loss")] == [2, 4]


@pytest.mark.slow
def test_early_stopping_and_best_by_lightnings_own_callbacks(fit: Fit) -> None:
    # fmt: off
    code, folder = fit(
        "--trainer.max_epochs", "6", "--model.learning_rate", "1e-12",
        "--trainer.callbacks+={class_path: EarlyStopping, init_args: {monitor: val_loss, min_delta: 1.0, patience: 2}}",
        "--trainer.callbacks+={class_path: ModelCheckpoint, init_args: {monitor: val_loss, save_top_k: 1}}",
    )
    # fmt: on
    assert code == 0
    assert read(folder.status)["step"] == 12
    assert list(folder.checkpoints.glob("epoch=*"))


@pytest.mark.slow
def test_samples_are_written(fit: Fit) -> None:
    # fmt: off
    code, folder = fit(
        "--trainer.max_steps", "3",
        "--trainer.callbacks+={class_path: GenerateSamples, init_args: {prompts: [Spell kamo.], every_n_steps: 2}}",
    )
    # fmt: on
    assert code == 0
    written = [json.loads(line) for line in folder.samples.read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in written] == [(2, "Spell kamo."), (3, "Spell kamo.")]
    assert all(line["completion"] for line in written)


@pytest.mark.slow
def test_looking_at_a_model_does_not_change_its_training(fit: Fit, tmp_path: Path) -> None:
    sampling = "{class_path: GenerateSamples, init_args: {prompts: [Spell kamo.], every_n_steps: 1, temperature: 1.0}}"
    fit("--trainer.max_steps", "3", "--model.neftune_alpha", "5")
    fit("--trainer.max_steps", "3", "--model.neftune_alpha", "5", f"--trainer.callbacks+={sampling}", folder="watched")
    runs = [RunFolder(tmp_path / name) for name in ("run", "watched")]
    plain, watched = (load_file(folder.export / "model.safetensors") for folder in runs)
    assert all(torch.equal(plain[name], tensor) for name, tensor in watched.items())


@pytest.mark.slow
def test_a_logger_of_lightning_gets_the_metrics(fit: Fit) -> None:
    code, folder = fit("--trainer.max_steps", "2", "--trainer.logger", "CSVLogger")
    assert code == 0
    (table,) = (folder.path / "loggers").rglob("metrics.csv")
    assert {"loss", "lr", "grad_norm"} <= set(table.read_text().splitlines()[0].split(","))


def test_validate_and_test_print_the_loss(trained: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained
    expected = series(read_metrics(folder), "val_loss")[-1][1]
    for verb, name in (("validate", "val_loss"), ("test", "test_loss")):
        capsys.readouterr()
        assert run([verb, "--config", str(folder.config), "--model.model", str(folder.export)]) == 0
        assert json.loads(capsys.readouterr().out)[name] == pytest.approx(expected, rel=1e-6)


def test_predict_writes_completions(tmp_path: Path, write_rows: WriteRows) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Spell kamo."}\n{"messages": [{"role": "user", "content": "Reverse tipa."}]}\n')
    # fmt: off
    assert run([
        "predict", "--model", "SFT", "--model.model", "demo", "--data", "ChatData",
        "--data.train", str(write_rows(2)), "--data.predict", str(prompts), "--to", str(tmp_path / "out.jsonl"),
    ]) == 0
    # fmt: on
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["completion"] for line in lines] == ["k-a-m-o", "apit"]
    assert lines[0]["messages"] == [{"role": "user", "content": "Spell kamo."}]


@pytest.mark.slow
def test_a_model_that_costs_more_is_announced(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit("--trainer.max_steps", "1")
    assert "note" not in capsys.readouterr().out
    slow = ModelCapabilities(
        "sdpa",
        has_linear_head=False,
        isolates_documents=False,
        reason="packed in a row, logits are off",
        adds_to_loss=True,
    )
    monkeypatch.setattr(causal_lm, "prove_attention", lambda *given: slow)
    fit("--trainer.max_steps", "1", folder="again")
    shown = capsys.readouterr().out
    assert "documents run one by one with sdpa: packed in a row, logits are off" in shown
    assert "full logits" in shown
    assert "other terms" in shown
