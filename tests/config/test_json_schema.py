"""The JSON Schema of recipes takes what the product takes, as another library reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import yaml

from lightning_hub.cli import run
from lightning_hub.config.json_schema import json_schema
from lightning_hub.config.schema import shipped_schema

ROOT = Path(__file__).parents[2] / "lightning_hub"
RECIPES = sorted([*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "demo").glob("*.yaml")])


@pytest.fixture(scope="module")
def faults() -> Callable[[object], list[str]]:
    made = json_schema(shipped_schema())
    jsonschema.Draft202012Validator.check_schema(made)
    validator = jsonschema.Draft202012Validator(made)
    return lambda recipe: [error.json_path for error in validator.iter_errors(recipe)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_recipes_are_valid(path: Path, faults: Callable[[object], list[str]]) -> None:
    assert faults(yaml.safe_load(path.read_text())) == []


def test_there_are_recipes() -> None:
    assert len(RECIPES) > 6


GOOD = [
    {"model": "LoRA"},
    {"model": {"class_path": "mine.Method", "init_args": {"anything": 1}}},
    {"trainer": {"strategy": {"class_path": "FSDP", "init_args": {"replicas": 2}}, "precision": 16}},
    {"trainer": {"strategy": {"class_path": "ModelParallel", "init_args": {"mesh_shape": [[1, 2], ["fsdp", "tp"]]}}}},
    {"trainer": {"callbacks": ["EarlyStopping", {"class_path": "GenerateSamples", "init_args": {"every_n_steps": 5}}]}},
    {"checkpoint": {"best": {"metric": "val_loss"}}},
    {"trainer": {"max_epochs": "${env:EPOCHS}"}},
]
WRONG = [
    {"modle": "LoRA"},
    {"model": "Lora"},
    {"model": {"class_path": "SFT", "init_args": {"learning_rat": 1}}},
    {"model": {"class_path": "SFT", "init_args": {"learning_rate": "fast"}}},
    {"model": {"class_path": "SFT", "init_args": {"learning_rate": 0}}},
    {"model": {"class_path": "LoRA", "init_args": {"r": 0}}},
    {"model": {"class_path": "SFT", "learning_rate": 1e-5}},
    {"trainer": {"strategy": "fsdp2"}},
    {"trainer": {"devices": 1.5}},
    {"checkpoint": {"keep": 1}},
    {"data": {"class_path": "ChatData", "init_args": {"on_long": "cut"}}},
]


@pytest.mark.parametrize("recipe", GOOD, ids=str)
def test_what_a_recipe_may_say(recipe: object, faults: Callable[[object], list[str]]) -> None:
    assert faults(recipe) == []


@pytest.mark.parametrize("recipe", WRONG, ids=str)
def test_what_a_recipe_may_not_say(recipe: object, faults: Callable[[object], list[str]]) -> None:
    assert faults(recipe)


@pytest.mark.parametrize("kind", ["model", "data", "trainer", "checkpoint"])
def test_every_default_is_valid(kind: str, faults: Callable[[object], list[str]]) -> None:
    for info in shipped_schema().of_kind(kind):
        options = {name: one.default for name, one in info.options.items() if one.has_default and not one.required}
        recipe = {kind: {"class_path": info.name, "init_args": options} if kind in ("model", "data") else options}
        assert options
        assert faults(recipe) == []


def test_the_verb_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schema", "--json-schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema(shipped_schema())
