from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_hub.config.check import RecipeError, check_recipe, find_faults
from lightning_hub.config.recipe import Recipe, recipe_from_text
from lightning_hub.config.schema import Schema
from lightning_hub.config.secrets import is_secret

GOOD = """\
seed_everything: 1
trainer: {strategy: ddp, devices: 2, precision: bf16-mixed, max_epochs: 3, max_time: "00:01:00:00"}
model:
  class_path: SFT
  init_args: {model: tiny, betas: [0.9, 0.99], warmup_ratio: 0.1}
data:
  class_path: ChatData
  init_args: {train: [{path: a.jsonl, weight: 2}], val: 0.1, columns: {prompt: q}, max_tokens_per_gpu: 4096}
checkpoint: {every_n_steps: 5, best: {metric: val_loss, mode: min}}
"""

# section, what is written there, and the right name that must be suggested
TYPOS = [
    ("top", "trianer: {}", "trainer"),
    ("top", "modle: {}", "model"),
    ("top", "dat: {}", "data"),
    ("top", "checkpoints: {}", "checkpoint"),
    ("top", "seed_everythin: 1", "seed_everything"),
    ("top", "seed: 1", "seed_everything"),
    ("top", "optimizer: {lr: 1}", "learning_rate"),
    ("top", "max_epochs: 3", "trainer.max_epochs"),
    ("trainer", "max_epoch: 3", "max_epochs"),
    ("trainer", "maxepochs: 3", "max_epochs"),
    ("trainer", "epochs: 3", "max_epochs"),
    ("trainer", "num_train_epochs: 3", "max_epochs"),
    ("trainer", "max_step: 3", "max_steps"),
    ("trainer", "device: 1", "devices"),
    ("trainer", "gpus: 1", "devices"),
    ("trainer", "num_node: 1", "num_nodes"),
    ("trainer", "nnodes: 1", "num_nodes"),
    ("trainer", "acelerator: cpu", "accelerator"),
    ("trainer", "precison: 32-true", "precision"),
    ("trainer", "strategy: ddpp", "ddp"),
    ("trainer", "strategy: fspd", "fsdp"),
    ("trainer", "strategy: model-parallel", "model_parallel"),
    ("trainer", "precision: bf16-mix", "bf16-mixed"),
    ("trainer", "precision: bf16mixed", "bf16-mixed"),
    ("trainer", "accelerator: cdua", "cuda"),
    ("trainer", "gradient_clip: 1.0", "gradient_clip_val"),
    ("trainer", "max_grad_norm: 1.0", "gradient_clip_val"),
    ("trainer", "gradient_clip_algorithm: nrom", "norm"),
    ("trainer", "log_every_n_step: 1", "log_every_n_steps"),
    ("trainer", "val_check_intervall: 1", "val_check_interval"),
    ("trainer", "callbacks: [EarlyStoping]", "EarlyStopping"),
    ("trainer", "logger: TensorboardLogger", "TensorBoardLogger"),
    ("trainer", "callbacks: [{class_path: EarlyStopping, init_args: {monitor: a, patiance: 1}}]", "patience"),
    ("trainer", "learning_rate: 1", "model.init_args.learning_rate"),
    ("model", "learning_rat: 1", "learning_rate"),
    ("model", "lr: 1", "learning_rate"),
    ("model", "weightdecay: 1", "weight_decay"),
    ("model", "wieght_decay: 1", "weight_decay"),
    ("model", "lr_schedular: cosine", "lr_scheduler"),
    ("model", "lr_scheduler: cosin", "cosine"),
    ("model", "lr_scheduler: lineer", "linear"),
    ("model", "warmup_step: 1", "warmup_steps"),
    ("model", "max_epochs: 1", "trainer.max_epochs"),
    ("model", "batch_size: 1", "data.init_args.effective_batch_size"),
    ("model", "attn_implementation: flash_attention2", "flash_attention_2"),
    ("model", "gradient_checkpoint: true", "gradient_checkpointing"),
    ("data", "max_seq_length: 5", "max_seq_len"),
    ("data", "max_tokens_per_gpus: 5", "max_tokens_per_gpu"),
    ("data", "effective_batchsize: 5", "effective_batch_size"),
    ("data", "train_on: asistant", "assistant"),
    ("data", "on_long: trunc", "truncate"),
    ("data", "formt: auto", "format"),
    ("data", "train_file: x", "train"),
    ("checkpoint", "every_n_step: 5", "every_n_steps"),
    ("checkpoint", "best: {metrik: loss}", "metric"),
    ("checkpoint", "best: {mode: mn}", "min"),
    ("checkpoint", "save_total_limit: 3", "keep"),
]


BASES = {
    "trainer": ("trainer:\n", "  num_sanity_val_steps: 0\n"),
    "model": ("model:\n  class_path: SFT\n  init_args:\n", "    model: tiny\n"),
    "data": ("data:\n  class_path: ChatData\n  init_args:\n", "    train: a.jsonl\n"),
    "checkpoint": ("checkpoint:\n", "  every_n_epochs: 1\n"),
}


def recipe_with(section: str, line: str) -> str:
    """Return a good recipe with one line more in a section (or in place of the one that gives the same key)."""
    text = f"{line}\n" if section == "top" else ""
    for name, (head, option) in BASES.items():
        indent = option[: -len(option.lstrip())]
        replaced = name == section and line.partition(":")[0] == option.strip().partition(":")[0]
        text += head + ("" if replaced else option) + (f"{indent}{line}\n" if name == section else "")
    return text


def faults_of(text: str) -> str:
    return "\n".join(str(fault) for fault in find_faults(recipe_from_text(text, "r.yaml")))


def test_a_good_recipe_has_no_fault() -> None:
    check_recipe(recipe_from_text(GOOD, "r.yaml"))


@pytest.mark.parametrize("section", ["trainer", "model", "data", "checkpoint"])
def test_the_recipes_that_carry_the_typos_are_good(section: str) -> None:
    assert faults_of(recipe_with(section, "")) == ""


def test_typos_are_refused_with_the_right_name() -> None:
    said = {line: faults_of(recipe_with(section, line)) for section, line, _ in TYPOS}
    refused = [line for line in said if said[line]]
    right = [line for _, line, name in TYPOS if name in said[line].partition(";")[2]]
    assert len(TYPOS) >= 50
    assert len(refused) == len(TYPOS)
    assert len(right) == len(TYPOS), {line: said[line] for _, line, _ in TYPOS if line not in right}


def test_a_wrong_recipe_is_refused_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(recipe_with("model", "learning_rat: 1"))
    code = (
        "import sys\nfrom lightning_hub.config.check import check_recipe\n"
        "from lightning_hub.config.command import parse_command\n"
        f"try: check_recipe(parse_command(['--config', {str(path)!r}]).recipe)\n"
        "except Exception as error: print(error)\n"
        "print([name for name in ('torch', 'numpy', 'lightning', 'jsonargparse') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, modules = done.stdout.strip().split("\n")
    assert said == f"{path}:7: model.init_args.learning_rat: not an option of SFT; did you mean learning_rate?"
    assert modules == "[]"


@pytest.mark.parametrize(
    ("section", "line", "said"),
    [
        ("trainer", "devices: two", "'two' is not a number of devices"),
        ("trainer", "devices: 0", "0 is not a number of devices"),
        ("trainer", "devices: true", "true is not"),
        ("trainer", "max_epochs: 1.5", "1.5 is not a whole number"),
        ("trainer", 'max_epochs: "3"', '"3" is not a whole number'),
        ("trainer", "max_epochs: -5", "out of range; give a number >= -1"),
        ("trainer", "max_time: soon", "DD:HH:MM:SS"),
        ("trainer", "accumulate_grad_batches: 4", "set data.init_args.effective_batch_size"),
        ("trainer", "use_distributed_sampler: true", "each rank would train only some"),
        ("trainer", "plugins: []", "[] is not null"),
        ("trainer", "callbacks: 3", "3 is not"),
        ("trainer", "callbacks: [CSVLogger]", "it is a logger class"),
        ("trainer", "callbacks: [LambdaCallback]", "LambdaCallback cannot be used"),
        ("trainer", "callbacks: [lightning.pytorch.callbacks.BatchSizeFinder]", "max_tokens_per_gpu"),
        ("trainer", "callbacks: [{class_path: EarlyStopping}]", "EarlyStopping needs monitor"),
        (
            "trainer",
            "callbacks: [{class_path: EarlyStopping, init_args: {monitor: vall_loss}}]",
            "did you mean val_loss?",
        ),
        (
            "trainer",
            "callbacks: [{class_path: ModelCheckpoint, init_args: {monitor: bleu}}]",
            "'bleu' is never measured",
        ),
        ("trainer", "callbacks: [{init_args: {}}]", "class_path is missing"),
        (
            "trainer",
            "callbacks: [{class_path: Timer, verbose: true}]",
            "write trainer.callbacks.0.init_args.verbose",
        ),
        ("model", "betas: [0.9]", "a list of 2"),
        ("model", "betas: [0.9, x]", "a list of 2"),
        ("model", "learning_rate: -1e-5", "give a number > 0"),
        ("model", "learning_rate: null", "null is not a number"),
        ("model", "label_smoothing: 1.0", "give a number >= 0, < 1"),
        ("model", "trust_remote_code: true", "give the flag --trust-remote-code"),
        ("model", "model: 3", "3 is not text"),
        ("data", "max_tokens_per_gpu: 100", "2048 is more than max_tokens_per_gpu (100)"),
        ("data", "max_seq_len: 1", "out of range"),
        (
            "trainer",
            "callbacks: [{class_path: EarlyStopping, init_args: {monitor: loss, min_delta: .inf}}]",
            "is finite",
        ),
        ("data", "columns: [a]", '["a"] is not a mapping'),
        ("data", "train: [{path: a, wieght: 1}]", "did you mean weight?"),
        ("checkpoint", "keep: 1", "out of range"),
        ("checkpoint", "best: 3", "3 is not"),
    ],
)
def test_wrong_values_are_named(section: str, line: str, said: str) -> None:
    assert said in faults_of(recipe_with(section, line))


def test_all_faults_are_reported_each_with_its_line() -> None:
    text = GOOD.replace("max_epochs", "max_epoch").replace("betas", "beta").replace("metric", "metrc")
    with pytest.raises(RecipeError) as error:
        check_recipe(recipe_from_text(text, "r.yaml"))
    assert [fault.where for fault in error.value.faults] == ["r.yaml:2", "r.yaml:5", "r.yaml:9"]
    assert len(str(error.value).splitlines()) == 3


def test_missing_sections_and_options_are_reported() -> None:
    assert "model is missing" in faults_of("data: {class_path: ChatData, init_args: {train: x}}\n")
    assert "SFT needs model" in faults_of("model: SFT\ndata: {class_path: ChatData, init_args: {train: x}}\n")
    assert "data is missing" in faults_of("model: {class_path: SFT, init_args: {model: x}}\n")


def watching(callback: str, metric: str) -> str:
    """Return a good recipe with a callback that watches a metric, beside one that measures the loss on old data."""
    items = f"{{class_path: {callback}, init_args: {{monitor: {metric}}}}}"
    items += ", {class_path: Forgetting, init_args: {eval_also: {chat: x}}}"
    return GOOD.replace("max_epochs: 3,", f"max_epochs: 3, callbacks: [{items}],")


@pytest.mark.parametrize(
    ("callback", "metric", "said"),
    [
        ("EarlyStopping", "val_loss", ""),
        ("EarlyStopping", "forgetting/chat", ""),
        ("ModelCheckpoint", "grad_norm", ""),
        ("ModelCheckpoint", "null", ""),
        ("EarlyStopping", "bleu, strict: false", ""),
        ("EarlyStopping", '"${env:METRIC}"', ""),
        ("mine.Watcher", "bleu", ""),
        ("EarlyStopping", "bleu", "'bleu' is never measured; there are loss, grad_norm, val_loss, forgetting/chat"),
        ("EarlyStopping", "forgetting/cat", "did you mean forgetting/chat?"),
    ],
)
def test_what_is_watched_must_be_measured(callback: str, metric: str, said: str) -> None:
    faults = [fault for fault in faults_of(watching(callback, metric)).splitlines() if "measured" in fault]
    assert [said in fault for fault in faults] == [True] * bool(said)


def test_the_validation_loss_is_watched_only_where_there_is_one() -> None:
    said = faults_of(watching("EarlyStopping", "val_loss").replace("val: 0.1, ", ""))
    assert said.count("val_loss is never measured: there is no validation data; set data.val") == 2
    assert "checkpoint.best.metric" in said


def test_options_are_those_of_the_chosen_class(with_lora: Schema) -> None:
    text = recipe_with("model", "r: 0").replace("SFT", "SampleLoRA")
    faults = find_faults(recipe_from_text(text, "r.yaml", with_lora), schema=with_lora)
    assert [fault.message for fault in faults] == ["model.init_args.r: 0 is out of range"]
    assert "not an option of SFT" in faults_of(recipe_with("model", "r: 4"))


@pytest.mark.security("S7")
@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("model", "hub_token: canary123"),
        ("model", "api_key: canary123"),
        ("top", "HF_TOKEN: canary123"),
        ("model", "password: canary123"),
        ("data", "train: https://me:canary123@host/x.jsonl"),
        ("data", "chat_template: hf_abcdefghijklmnopqrstcanary123"),
        ("trainer", "x: {aws_secret_access_key: canary123}"),
        ("top", "# curl https://me:canary123@host"),
        ("trainer", "max_epochs: hf_abcdefghijklmnopqrstcanary123"),
        ("model", "hf_abcdefghijklmnopqrstcanary123: 1"),
    ],
)
def test_literal_secrets_are_refused_and_never_repeated(section: str, line: str) -> None:
    said = faults_of(recipe_with(section, line))
    assert "${env:NAME}" in said
    assert "canary123" not in said


@pytest.mark.security("S7")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_cls_token", True),
        ("num_memory_tokens", 4),
        ("num_memory_tokens", "many"),
        ("pad_token", "<pad>"),
        ("tokens_per_step", 100),
        ("max_tokens_per_gpu", "x"),
        ("token", "${env:HF_TOKEN}"),
        ("monkey", "x"),
        ("key", "x"),
        ("model", "https://host/path@v2"),
        ("train", "s3://bucket/a.jsonl"),
    ],
)
def test_what_only_looks_like_a_secret_passes(key: str, value: str | bool | int) -> None:
    assert not is_secret(key, value)


def test_a_reference_to_the_environment_passes_every_type() -> None:
    recipe = recipe_from_text(recipe_with("model", "learning_rate: ${env:RATE}"), "r.yaml")
    assert find_faults(recipe) == []


def test_an_empty_recipe_says_what_is_missing() -> None:
    assert {fault.message for fault in find_faults(Recipe({}))} == {"model is missing", "data is missing"}
