from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from lightning_hub.config.recipe import recipe_from_text
from lightning_hub.config.resolved import ResolvedConfig
from lightning_hub.errors import ConfigError
from lightning_hub.launch.environment import ProcessInfo
from lightning_hub.launch.topology import Topology, resolve_topology


def settled(
    text: str, process: ProcessInfo | None = None, gpus: int = 0, model: str = ""
) -> tuple[Topology, Mapping[str, Any], list[str]]:
    recipe = recipe_from_text(f"trainer: {{{text}}}\nmodel: {{init_args: {{{model}}}}}", "recipe.yaml")
    given: Any = recipe.tree["trainer"]
    trainer = {"num_nodes": 1, "devices": "auto", "strategy": "auto", "accelerator": "auto", **given}
    said: list[str] = []
    topology, config = resolve_topology(recipe, ResolvedConfig.of({"trainer": trainer}), process, gpus, said.append)
    return topology, config.trainer.options, said


EIGHT = ProcessInfo(5, 8, 1, 4, "torchrun")


@pytest.mark.parametrize(
    ("text", "process", "gpus", "shape"),
    [
        ("", None, 0, (1, 1)),
        ("", None, 4, (1, 4)),
        ("accelerator: cpu", None, 4, (1, 1)),
        ("devices: 2, accelerator: cpu", None, 4, (1, 2)),
        ("devices: -1", None, 4, (1, 4)),
        ("devices: [0, 2]", None, 4, (1, 2)),
        ("devices: '0,3'", None, 4, (1, 2)),
        ("devices: '2'", None, 0, (1, 2)),
        ("", EIGHT, 4, (2, 4)),
        ("devices: 4, num_nodes: 2", EIGHT, 4, (2, 4)),
        ("devices: 4", EIGHT, 4, (2, 4)),
    ],
)
def test_the_shape_of_a_run(text: str, process: ProcessInfo | None, gpus: int, shape: tuple[int, int]) -> None:
    topology, trainer, _ = settled(text, process, gpus)
    assert topology == Topology(*shape)
    assert trainer["num_nodes"] == shape[0]
    assert trainer["devices"] == shape[1] or len(trainer["devices"]) == shape[1]


@pytest.mark.parametrize(
    ("text", "process", "gpus", "said"),
    [
        ("devices: 8, num_nodes: 2", EIGHT, 8, r"2 x 8 = 16 processes, torchrun started 2 x 4 = 8"),
        ("devices: 4, num_nodes: 1", EIGHT, 4, r"1 x 4 = 4 processes, torchrun started 2 x 4 = 8"),
        ("num_nodes: 2", None, 4, "2 nodes"),
        ("devices: 8", None, 4, "8 devices are asked for, 4 GPUs"),
        ("devices: 2, strategy: SingleDeviceStrategy", None, 0, "SingleDeviceStrategy"),
        ("devices: 4, strategy: {class_path: FSDP, init_args: {replicas: 3}}", None, 0, "recipe.yaml:1: 4 processes"),
        ("strategy: {class_path: ModelParallel, init_args: {mesh_shape: [[8, 2], [fsdp, tp]]}}", EIGHT, 4, "run has 8"),
        ("strategy: {class_path: ModelParallel, init_args: {mesh_shape: [2, 2]}}", EIGHT, 4, "write sizes and names"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_numbers(
    text: str, process: ProcessInfo | None, gpus: int, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        settled(text, process, gpus)


TWO_PARTS = "devices: 2, strategy: {class_path: ModelParallel, init_args: {mesh_shape: [[1, 2], [fsdp, tp]]}}"


@pytest.mark.parametrize(
    ("text", "model", "said"),
    [
        (TWO_PARTS, "use_dora: true", r"recipe.yaml:2: use_dora does not work with tensor parallelism \(tp 2\)"),
        ("devices: 2", "quantization: nf4", "recipe.yaml:2: nf4 weights can be trained by one process only, .* has 2"),
    ],
)
def test_what_a_method_cannot_do_on_several_processes_is_refused(text: str, model: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settled(text, model=model)


def test_a_method_that_can_be_spread_is_settled() -> None:
    assert settled("devices: 2, strategy: fsdp", model="use_dora: true")[0] == Topology(1, 2)
    assert settled(TWO_PARTS, model="use_dora: false, quantization: none")[0] == Topology(1, 2)


def test_idle_devices_are_named() -> None:
    assert settled("devices: 2", gpus=8)[2] == ["6 of 8 GPUs stay idle: trainer.devices is 2"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "{class_path: FSDP, init_args: {cpu_offload: true}}"])
def test_one_process_shares_out_nothing(strategy: str) -> None:
    _, trainer, said = settled(f"strategy: {strategy}")
    assert trainer["strategy"] == "auto"
    assert "one process" in said[0]
