"""Hostile recipes: each is refused from its plain values, before anything that it names is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_hub.config.check import find_faults
from lightning_hub.config.recipe import recipe_from_text
from lightning_hub.config.safety import AllowList, check_names
from lightning_hub.config.schema import shipped_schema
from tests.conftest import time_of_children

pytestmark = pytest.mark.security("S4")

MODEL = "model: {class_path: SFT, init_args: {model: tiny}}\n"
DATA = "data: {class_path: ChatData, init_args: {train: a.jsonl}}\n"

# Each would, given to the parser, run code that creates the file `canary`, or import the module `evil`.
PAYLOADS = {
    "popen as callback": "trainer: {callbacks: [{class_path: subprocess.Popen, init_args: {args: [touch, canary]}}]}",
    "os.system as logger": "trainer: {logger: {class_path: os.system, init_args: {command: touch canary}}}",
    "eval": "trainer: {callbacks: [{class_path: builtins.eval, init_args: {source: open('canary','w')}}]}",
    "exec": "trainer: {callbacks: [{class_path: builtins.exec, init_args: {source: open('canary','w')}}]}",
    "partial": "trainer: {callbacks: [{class_path: functools.partial, init_args: {func: os.system}}]}",
    "module here": "trainer: {callbacks: [{class_path: evil.Callback}]}",
    "module here as text": "trainer: {callbacks: [evil.Callback]}",
    "module here as logger text": "trainer: {logger: evil.Logger}",
    "strategy text": "trainer: {strategy: evil.Strategy}",
    "profiler text": "trainer: {profiler: evil.Profiler}",
    "plugins": "trainer: {plugins: [{class_path: evil.Plugin}]}",
    "nested in init_args": (
        "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: {class_path: subprocess.Popen}}}]}"
    ),
    "deeper still": "trainer: {logger: {class_path: WandbLogger, init_args: {x: [{y: {class_path: os.system}}]}}}",
    "base": "__base__: evil.yaml",
    "hydra target": "trainer: {callbacks: [{_target_: os.system, command: touch canary}]}",
    "anchor": "x: &bad {class_path: subprocess.Popen, init_args: {args: [ls]}}\ntrainer: {callbacks: [*bad]}",
    "merge key": "x: &bad {class_path: subprocess.Popen}\ntrainer: {callbacks: [{<<: *bad, init_args: {args: [ls]}}]}",
    "python tag": "trainer: !!python/object/apply:os.system [touch canary]",
    "re-exported module": "trainer: {callbacks: [{class_path: lightning.pytorch.cli.os.system}]}",
    "re-exported module's class": "trainer: {callbacks: [{class_path: lightning.pytorch.trainer.trainer.os.X}]}",
    "re-exported function": "trainer: {callbacks: [{class_path: lightning.pytorch.cli.instantiate_class}]}",
    "prefix without a dot": "trainer: {callbacks: [{class_path: lightning_hub_evil.Callback}]}",
    "prefix of a name": "trainer: {callbacks: [{class_path: torch.optimevil.Callback}]}",
    "no identifier": "trainer: {callbacks: [{class_path: 'os.system(\"touch canary\")'}]}",
    "empty part": "trainer: {callbacks: [{class_path: lightning.pytorch..cli.os.system}]}",
    "dict_kwargs": "trainer: {callbacks: [{class_path: EarlyStopping, dict_kwargs: {x: {class_path: os.system}}}]}",
    "function of a callback": "trainer: {callbacks: [{class_path: LambdaCallback, init_args: {setup: os.system}}]}",
    "function of a weight average": (
        "trainer: {callbacks: [{class_path: StochasticWeightAveraging, init_args: {swa_lrs: 0.1, avg_fn: os.system}}]}"
    ),
    "hook of a strategy": "trainer: {strategy: {class_path: DDPStrategy, init_args: {ddp_comm_hook: os.system}}}",
    "other keys of a logger": "trainer: {logger: {class_path: WandbLogger, init_args: {settings: os.system}}}",
    "model section": "model: {class_path: evil.Model}",
    "model as a file": "model: evil.yaml",
    "data as text": "data: evil.Data",
    "class path is no text": "trainer: {callbacks: [{class_path: [os.system]}]}",
    "unknown section": "anything: {class_path: evil.Thing}",
    "config inside": "config: evil.yaml",
    "remote code": "model: {class_path: SFT, init_args: {model: tiny, trust_remote_code: true}}",
}


def recipe_text(payload: str) -> str:
    sections = "".join(text for name, text in (("model", MODEL), ("data", DATA)) if not payload.startswith(name))
    return f"{payload}\n{sections}"


def test_the_harmless_part_of_the_payloads_is_good() -> None:
    assert find_faults(recipe_from_text(MODEL + DATA, "r")) == []


def test_payloads_are_refused_within_a_second_and_leave_no_trace(tmp_path: Path) -> None:
    plant = f"open({str(tmp_path / 'canary')!r}, 'w').close()\n"
    for name in ("evil", "lightning_hub_evil", "torch"):
        (tmp_path / f"{name}.py").write_text(plant)
    (tmp_path / "evil.yaml").write_text("class_path: subprocess.Popen\n")
    files = []
    for number, payload in enumerate(PAYLOADS.values()):
        files.append(f"p{number}.yaml")
        (tmp_path / files[-1]).write_text(recipe_text(payload))
    code = (
        "import sys\n"
        "from lightning_hub.config.check import check_recipe\nfrom lightning_hub.config.command import parse_command\n"
        "from lightning_hub.errors import ConfigError\n"
        "for file in sys.argv[1:]:\n"
        "    try: check_recipe(parse_command(['--config', file]).recipe)\n"
        "    except ConfigError: continue\n"
        "    print('passed', file)\n"
        "print([m for m in ('evil', 'torch', 'lightning', 'subprocess') if m in sys.modules])\n"
    )
    began = time_of_children()
    done = subprocess.run(
        [sys.executable, "-c", code, *files], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert time_of_children() - began < 1.0 + 0.5  # starting Python included
    assert not (tmp_path / "canary").exists()


def test_names_given_as_functions_are_refused_as_names_too() -> None:
    for payload in (payload for name, payload in PAYLOADS.items() if "function of" in name or "hook of" in name):
        recipe = recipe_from_text(recipe_text(payload), "r")
        said = [fault.message for fault in check_names(recipe, shipped_schema(), AllowList())]
        assert any("would import" in message for message in said), payload


@pytest.mark.parametrize(
    "name",
    [
        "EarlyStopping",
        "lightning.pytorch.callbacks.EarlyStopping",
        "lightning.pytorch.callbacks.early_stopping.EarlyStopping",
        "lightning.pytorch.callbacks.Timer",
    ],
)
def test_allowed_callbacks_pass(name: str) -> None:
    args = "monitor: loss" if "Early" in name else ""
    text = f"trainer: {{callbacks: [{{class_path: {name}, init_args: {{{args}}}}}]}}\n{MODEL}{DATA}"
    assert find_faults(recipe_from_text(text, "r")) == []


@pytest.mark.parametrize(
    ("name", "is_class"),
    [
        ("torch.optim.AdamW", True),
        ("torch.optim.lr_scheduler.CosineAnnealingLR", True),
        ("torch.utils.data.DataLoader", True),
        ("lightning.pytorch.strategies.DeepSpeedStrategy", True),
        ("lightning.pytorch.loggers.csv_logs.CSVLogger", True),
        ("torch.optim.sgd.Optimizer", True),
        ("torch.optim", False),
        ("torch.nn.Linear", False),
        ("lightning.pytorch.cli.sys.exit", False),
        ("lightning.pytorch.cli.yaml.load", False),
        ("lightning.pytorch.seed_everything", False),
        ("torch.utils.data.dataloader.multiprocessing.Process", False),
        ("lightning.pytorch.callbacks.Absent", False),
    ],
)
def test_only_classes_defined_under_a_prefix_are_accepted(name: str, is_class: bool) -> None:
    assert AllowList().holds_class(name) is is_class


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    (package / "callbacks.py").write_text("import os\nfrom .base import Base\nclass Watch(Base): ...\ndef run(): ...\n")
    (package / "base.py").write_text("class Base: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    return package


def own(name: str, prefix: str | None) -> list[str]:
    text = f"trainer: {{callbacks: [{{class_path: {name}, init_args: {{f: a.jsonl}}}}]}}\n{MODEL}{DATA}"
    return [str(fault) for fault in find_faults(recipe_from_text(text, "r"), allow_classes=[prefix] if prefix else [])]


@pytest.mark.usefixtures("own_package")
def test_a_user_can_allow_another_package() -> None:
    assert "--allow-class mine.callbacks" in own("mine.callbacks.Watch", None)[0]
    assert own("mine.callbacks.Watch", "mine") == own("mine.callbacks.Base", "mine.") == []
    assert "is not a class" in own("mine.callbacks.os.system", "mine")[0]
    assert "is not a class" in own("mine.callbacks.run", "mine")[0]
    assert "outside" in own("mine.callbacks.Watch", "min")[0]
    assert "mine" not in sys.modules


def test_options_of_an_unknown_class_have_no_importable_name(own_package: Path) -> None:
    text = f"trainer: {{callbacks: [{{class_path: mine.callbacks.Watch, init_args: {{f: os.system}}}}]}}\n{MODEL}{DATA}"
    faults = find_faults(recipe_from_text(text, "r"), allow_classes=["mine"])
    assert "would import" in faults[0].message


def test_a_file_name_is_not_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "os.py").touch()
    text = (
        MODEL
        + "data: {class_path: ChatData, init_args: {train: os.path, val: data.jsonl, columns: {prompt: os.path}}}\n"
    )
    assert find_faults(recipe_from_text(text, "r")) == []
