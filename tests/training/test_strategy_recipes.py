"""The shipped strategy recipes, each added to a recipe as a second --config."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_hub.cli import run
from lightning_hub.config.check import check_recipe
from lightning_hub.config.command import parse_command
from lightning_hub.config.resolve import fill_defaults
from lightning_hub.config.resolved import ResolvedConfig
from lightning_hub.launch.topology import resolve_topology
from tests.conftest import WriteRows

CONFIGS = Path(__file__).parents[2] / "configs"
STRATEGIES = sorted((CONFIGS / "strategy").glob("*.yaml"))


@pytest.mark.parametrize("recipe", STRATEGIES, ids=lambda path: path.stem)
def test_a_strategy_is_read_beside_a_recipe(recipe: Path) -> None:
    read = parse_command(["--config", str(CONFIGS / "sft.yaml"), "--config", str(recipe)]).recipe
    check_recipe(read)
    topology, config = resolve_topology(read, ResolvedConfig.of(fill_defaults(read)), process=None, gpus=0)
    assert topology.world_size == 2
    assert config.trainer.options["precision"] == "bf16-mixed", "the rest of the recipe stays"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", STRATEGIES, ids=lambda path: path.stem)
def test_a_strategy_runs_beside_a_recipe(recipe: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    # fmt: off
    assert run([
        "fit", "--config", str(CONFIGS / "sft.yaml"), "--config", str(recipe), "--run-dir", str(tmp_path / "run"),
        "--data.train", str(write_rows(60)), "--trainer.max_steps", "2", "--trainer.accelerator", "cpu",
    ]) == 0
    # fmt: on
    assert (tmp_path / "run/export/model.safetensors").is_file()
