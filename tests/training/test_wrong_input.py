"""A person's mistake: one sentence, exit code 2, nothing trained, no traceback."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from lightning_hub.cli import run
from lightning_hub.errors import ConfigError
from lightning_hub.models.pretrained import EMBEDDED_FOLDER, Pretrained
from lightning_hub.runs.metrics import read_metrics
from tests.conftest import PATIENCE
from tests.training.conftest import Fit


def refused(code: int, capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    error = capsys.readouterr().err
    assert code == 2, error
    assert "Traceback" not in error
    for part in parts:
        assert part in error, error


RECIPE = """\
trainer:
  max_epocs: 3
model:
  class_path: SFT
  init_args: {model: demo, learning_rate: fast}
data:
  class_path: ChatDta
"""


def test_all_faults_of_a_recipe_are_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    code = run(["fit", "--config", str(recipe), "--runs-root", str(tmp_path / "runs")])
    refused(code, capsys, f"{recipe}:2", "max_epochs", f"{recipe}:5", "learning_rate", f"{recipe}:7", "ChatData")
    assert not (tmp_path / "runs").exists(), "nothing was started"


PARALLEL = ("--trainer.strategy.class_path", "ModelParallel", "--trainer.strategy.init_args.mesh_shape")
REPLICAS = ("--trainer.strategy.class_path", "FSDP", "--trainer.strategy.init_args.replicas", "3")

FLAGS: dict[str, tuple[list[str], list[str]]] = {
    "unknown flag": (["--run-dri", "x"], ["--run-dri", "did you mean --run-dir"]),
    "unknown option": (["--model.lerning_rate", "1"], ["learning_rate"]),
    "unknown strategy": (["--trainer.strategy", "ddpp"], ["ddpp", "ddp"]),
    "devices in words": (["--trainer.devices", "two"], ["trainer.devices"]),
    "accumulation": (["--trainer.accumulate_grad_batches", "2"], ["effective_batch_size"]),
    "nodes without a launcher": (["--trainer.num_nodes", "2"], ["2 nodes", "torchrun"]),
    "a mesh that does not fit": ([*PARALLEL, "[[2, 2], [fsdp, tp]]"], ["2 x 2 = 4", "run has 1", "[[1, 1]"]),
    "no mesh": (["--trainer.strategy", "model_parallel", "--trainer.devices", "2"], ["mesh_shape", "[[2, 1]"]),
    "replicas that do not fit": ([*REPLICAS, "--trainer.devices", "4"], ["3 equal replicas", "1, 2, 4"]),
    "row shorter than a sample": (["--data.max_tokens_per_gpu", "32"], ["max_seq_len", "max_tokens_per_gpu"]),
    "both batch sizes": (["--data.tokens_per_step", "128"], ["effective_batch_size"]),
    "remote code by recipe": (["--model.trust_remote_code", "true"], ["--trust-remote-code"]),
    "class outside the allow-list": (["--trainer.callbacks+=subprocess.Popen"], ["subprocess.Popen"]),
    "a way to treat NaN": (["--model.on_nan", "ignore"], ["on_nan", "skip:3"]),
    "two warm-ups": (["--model.warmup_steps", "2", "--model.warmup_ratio", "0.1"], ["warmup"]),
    "one checkpoint only": (["--checkpoint.keep", "1"], ["checkpoint.keep"]),
    "no model": (["--model.model", "./nowhere"], ["no such folder: ./nowhere"]),
    "model by address": (["--model.model", "https://example.com/m"], ["is a URL"]),
    "no data": (["--data.train", "nowhere.jsonl"], ["nowhere.jsonl"]),
    "too many positions": (["--data.max_seq_len", "5000"], ["5000", "4096 positions"]),
    "unknown template": (["--data.chat_template", "chatmll"], ["chatmll"]),
    "long rows": (["--data.max_seq_len", "20"], ["on_long"]),
}


@pytest.mark.parametrize("case", FLAGS)
def test_wrong_flags(fit: Fit, capsys: pytest.CaptureFixture[str], case: str) -> None:
    flags, parts = FLAGS[case]
    code, folder = fit(*flags)
    refused(code, capsys, *parts)
    assert not folder.export.exists()
    assert not read_metrics(folder)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        pytest.param(b"", ["rows.jsonl"], id="empty"),
        pytest.param(b'{"messages": [', ["rows.jsonl:1"], id="cut"),
        pytest.param(b'{"a": 1}\n', ["a"], id="unknown format"),
        pytest.param(b'\xff{"messages"\n', ["rows.jsonl:1"], id="no UTF-8"),
        pytest.param(b"[[[[[[", ["rows.jsonl"], id="nested"),
    ],
)
@pytest.mark.fault("F34")
def test_wrong_data(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, parts: list[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(content)
    code, folder = fit(rows=rows)
    refused(code, capsys, *parts)
    assert json.loads(folder.status.read_text())["state"] == "failed"
    assert json.loads(folder.rank(1, 0).error.read_text())["class"] in ("data", "config")


ChangeModel = Callable[[Path], None]


def larger_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(20)])
    tokenizer.save_pretrained(folder)


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def not_causal(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def cut_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.fault("F37")
@pytest.mark.fault("F38")
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (larger_tokenizer, ["id 280", "264 rows"]),
        (no_template, ["chat template", "chat_template"]),
        (not_causal, ["not a causal language model"]),
        (no_config, ["has no config.json"]),
        (cut_weights, ["cannot read the weights"]),
        (no_tokenizer, ["cannot read the tokenizer"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_wrong_models(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: ChangeModel, parts: list[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED_FOLDER, folder)
    change(folder)
    code, _ = fit("--model.model", str(folder))
    refused(code, capsys, *parts)


@pytest.mark.security("S3")
def test_remote_code_runs_by_flag_only(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(EMBEDDED_FOLDER, folder)
    config = json.loads((folder / "config.json").read_text())
    remote = {"auto_map": {"AutoConfig": "modeling_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config | remote | {"model_type": "mine"}))
    (folder / "modeling_mine.py").write_text(f"open({str(canary)!r}, 'w').write('ran')\nraise ImportError('stop here')")
    code, _ = fit("--model.model", str(folder))
    refused(code, capsys, "--trust-remote-code")
    assert not canary.exists()
    fit("--model.model", str(folder), "--trust-remote-code", folder="trusted")
    assert canary.exists()


@pytest.mark.security("S5")
@pytest.mark.slow
def test_a_stray_module_in_the_working_folder_is_not_imported(tmp_path: Path) -> None:
    for name in ("torch", "callbacks", "yaml", "rich"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    command = [sys.executable, "-m", "lightning_hub", "predict", "--model", "SFT", "--model.model", "demo"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "Spell kamo."}\n')
    command += ["--data", "ChatData", "--data.train", "p.jsonl", "--data.predict", "p.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert not (tmp_path / "canary").exists(), done.stderr
    assert "k-a-m-o" in done.stdout


def test_a_run_folder_in_use_is_left_alone(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.max_steps", "1")[0] == 0
    capsys.readouterr()
    code, folder = fit("--trainer.max_steps", "1")
    refused(code, capsys, "not empty", "--resume")
    assert json.loads(folder.status.read_text())["state"] == "finished"


def test_debug_shows_the_traceback() -> None:
    command = [sys.executable, "-m", "lightning_hub", "fitt", "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert "Traceback" in done.stderr
    assert "did you mean fit?" in done.stderr


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.canary), "w")


@pytest.mark.security("S1")
@pytest.mark.parametrize("kind", ["payload", "empty", "noise"])
def test_pickled_weights_run_nothing_and_are_refused_in_one_sentence(tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(EMBEDDED_FOLDER, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    contents = {"payload": pickle.dumps({"a": Payload(tmp_path / "canary")}), "empty": b"", "noise": b"no pickle"}
    (folder / "pytorch_model.bin").write_bytes(contents[kind])
    with pytest.raises(ConfigError, match="cannot read the weights of") as raised:
        Pretrained(str(folder)).load(dtype=torch.float32, attn_implementation="sdpa")
    assert "weights_only" not in str(raised.value)
    assert not (tmp_path / "canary").exists()
