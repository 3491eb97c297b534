from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_hub.config.command import explain_flag, parse_command
from lightning_hub.config.recipe import Recipe, build_recipe
from lightning_hub.config.schema import Schema
from lightning_hub.errors import ConfigError

BASE = """\
seed_everything: 42
trainer:
  max_epochs: 3
  precision: 32-true
model:
  class_path: SFT
  init_args:
    model: tiny
    learning_rate: 1e-5
    label_smoothing: 0.1
data:
  class_path: ChatData
  init_args: {train: a.jsonl, columns: {prompt: q}}
"""

TOP = """\
trainer: {max_epochs: 5, devices: [0]}
data: {init_args: {train: [b.jsonl], columns: {completion: a}}}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


Read = Callable[..., Recipe]


@pytest.fixture
def read(with_lora: Schema) -> Read:
    return lambda *argv: parse_command([str(word) for word in argv], with_lora).recipe


def test_later_files_win_and_lists_replace(base: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.yaml"
    top.write_text(TOP)
    recipe = build_recipe([base, top])
    assert recipe.get("trainer.max_epochs") == 5
    assert recipe.get("trainer.precision") == "32-true"
    assert recipe.get("data.init_args.train") == ["b.jsonl"]
    assert recipe.get("data.init_args.columns") == {"prompt": "q", "completion": "a"}
    assert recipe.where("trainer.max_epochs") == f"{top}:1"
    assert recipe.where("trainer.precision") == f"{base}:4"
    assert [source.text for source in recipe.sources] == [BASE, top.read_text()]


def places_below(recipe: Recipe, path: str) -> list[str | None]:
    value = recipe.get(path)
    deeper = [f"{path}.{key}" for key in value] if isinstance(value, dict) else []
    return [recipe.where(name) for name in (path, *deeper)]


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (["--model.learning_rate", "1e-6"], "model.init_args.learning_rate", 1e-6),
        (["--model.init_args.learning_rate=1e-6"], "model.init_args.learning_rate", 1e-6),
        (["--trainer.precision", "32-true"], "trainer.precision", "32-true"),
        (["--trainer.max_steps", "-1"], "trainer.max_steps", -1),
        (["--trainer.fast_dev_run"], "trainer.fast_dev_run", True),
        (["--data.train", "2024"], "data.init_args.train", "2024"),
        (["--data.train", "*.jsonl"], "data.init_args.train", "*.jsonl"),
        (["--data.train", "[a.jsonl, b.jsonl]"], "data.init_args.train", ["a.jsonl", "b.jsonl"]),
        (["--data.train=a: b.jsonl"], "data.init_args.train", "a: b.jsonl"),
        (["--data.val", "0.02"], "data.init_args.val", 0.02),
        (["--data.columns.completion", "answer"], "data.init_args.columns", {"prompt": "q", "completion": "answer"}),
        (["--checkpoint.best", "{metric: loss}"], "checkpoint.best", {"metric": "loss"}),
        (["--checkpoint.best.keep", "2"], "checkpoint.best.keep", 2),
        (["--seed_everything", "7"], "seed_everything", 7),
        (["--trainer.max_epochs=null"], "trainer.max_epochs", None),
        (["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "x"], "trainer.logger",
         {"class_path": "CSVLogger", "init_args": {"save_dir": "x"}}),
        (["--trainer.logger.save_dir", "x", "--trainer.logger", "CSVLogger"], "trainer.logger",
         {"class_path": "CSVLogger", "init_args": {"save_dir": "x"}}),
    ],
)  # fmt: skip
def test_overrides(read: Read, base: Path, words: list[str], path: str, value: object) -> None:
    recipe = read("--config", base, *words)
    assert recipe.get(path) == value
    assert any(str(place).startswith("--") for place in places_below(recipe, path))


def test_overrides_win_at_every_position(read: Read, base: Path) -> None:
    assert read("--trainer.max_epochs", "9", "--config", base).get("trainer.max_epochs") == 9


def test_callbacks_are_appended(read: Read, base: Path) -> None:
    recipe = read(
        "--config", base,
        "--trainer.callbacks+=EarlyStopping",
        "--trainer.callbacks+", "{class_path: ModelSummary, init_args: {max_depth: 2}}",
        "--trainer.callbacks.1.init_args.max_depth", "3",
    )  # fmt: skip
    assert recipe.get("trainer.callbacks") == [
        "EarlyStopping",
        {"class_path": "ModelSummary", "init_args": {"max_depth": 3}},
    ]


@pytest.mark.parametrize("key", ["0.patience", "0.init_args.patience"])
def test_an_appended_callback_takes_options(read: Read, base: Path, key: str) -> None:
    words = ["--trainer.callbacks+=EarlyStopping", f"--trainer.callbacks.{key}", "3", "--trainer.callbacks.0.mode=max"]
    assert read("--config", base, *words).get("trainer.callbacks") == [
        {"class_path": "EarlyStopping", "init_args": {"patience": 3, "mode": "max"}}
    ]


@pytest.mark.parametrize("words", ["--model SampleLoRA --model.r 4", "--model.r 4 --model SampleLoRA"])
def test_a_new_class_keeps_shared_options_and_names_what_it_drops(read: Read, base: Path, words: str) -> None:
    recipe = read("--config", base, *words.split())
    assert recipe.tree["model"] == {
        "class_path": "SampleLoRA",
        "init_args": {"model": "tiny", "learning_rate": 1e-5, "r": 4},
    }
    assert len(recipe.notes) == 1
    assert f"label_smoothing ({base}:10)" in recipe.notes[0]
    assert "learning_rate" not in recipe.notes[0]


def test_a_new_class_in_a_later_file_drops_too(with_lora: Schema, base: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.yaml"
    top.write_text("model: {class_path: SampleLoRA}\n")
    recipe = build_recipe([base, top], schema=with_lora)
    assert recipe.get("model.init_args") == {"model": "tiny", "learning_rate": 1e-5}
    assert "label_smoothing" in recipe.notes[0]


def test_what_is_not_of_the_recipe_is_left_to_the_caller(base: Path) -> None:
    command = parse_command(["--run-dir", "d", "--config", str(base), "--debug", "--resume=auto", "--", "--model", "x"])
    assert command.rest == ("--run-dir", "d", "--debug", "--resume=auto", "--", "--model", "x")
    assert command.recipe.tree["seed_everything"] == 42


def test_an_empty_section_wipes_nothing(base: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.yaml"
    top.write_text("trainer:\n  # max_epochs: 5\n")
    assert build_recipe([base, top]).get("trainer.max_epochs") == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config"], "--config needs a value"),
        (["--trainer.max_epochs"], "needs a value: a whole number or null"),
        (["--modle.learning_rate", "1"], "did you mean --model.learning_rate?"),
        (["--trainer..x", "1"], "empty key"),
        (["--trainer.callbacks+=[a"], "is not a value"),
        (["--trainer.callbacks+=A", "--trainer.callbacks.3.x", "1"], "'3' is not an item"),
        (["--trainer.callbacks+=A", "--trainer.callbacks.x", "1"], "write --trainer.callbacks.0.x"),
    ],
)
def test_refused_words(read: Read, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(*words)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("flag", "said"),
    [("--learning_rate", "--model.learning_rate"), ("--lr", "--model.learning_rate"), ("--run_dir", "--run-dir"),
     ("--epochs=3", "--trainer.max_epochs"), ("--batch-size", "--data.effective_batch_size"),
     ("--xyzzy", "see --help")],
)  # fmt: skip
def test_an_unknown_flag_is_explained(flag: str, said: str) -> None:
    assert said in str(explain_flag(flag, ["--run-dir", "--resume", "--debug"]))
