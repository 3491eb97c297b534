from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, LlamaConfig

from lightning_hub.errors import ConfigError
from lightning_hub.launch.mesh import Mesh, check_divisible, check_mesh, check_replicas, nearest_mesh, read_mesh
from lightning_hub.parallel.strategies import DDP, FSDP, ModelParallel, strategy_for
from lightning_hub.parallel.tensor_parallel import check_plan


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
def test_every_mesh_that_is_named_fits(fsdp: int, tp: int, world: int) -> None:
    for text in nearest_mesh(Mesh(fsdp, tp), world).split(" or "):
        sizes = text[2 : text.index("]")].split(", ")
        check_mesh(Mesh(int(sizes[0]), int(sizes[1])), world)


def test_axes_go_by_name() -> None:
    assert read_mesh(([4, 2], ["fsdp", "tp"])) == read_mesh(([2, 4], ["tp", "fsdp"])) == Mesh(fsdp=4, tp=2)
    assert ModelParallel(([2, 4], ["tp", "fsdp"])).axes(8) == {"fsdp": 4, "tp": 2}


@pytest.mark.parametrize(
    "shape",
    [
        ([4], ["fsdp"]),
        ([4, 2], ["fsdp", "fsdp"]),
        ([4, 2], ["fsdp", "pp"]),
        ([4], ["fsdp", "tp"]),
        ([0, 2], ["fsdp", "tp"]),
    ],
)
def test_meshes_that_say_too_little_or_too_much(shape: tuple[list[int], list[str]]) -> None:
    with pytest.raises(ConfigError, match="mesh_shape"):
        read_mesh(shape)


def test_a_mesh_of_another_size_names_the_nearest() -> None:
    with pytest.raises(ConfigError) as fault:
        strategy_for(ModelParallel(([3, 2], ["fsdp", "tp"])), world_size=8)
    assert "3 x 2 = 6 processes, the run has 8, which leaves 2 idle" in str(fault.value)
    assert str(fault.value).endswith("use [[4, 2], [fsdp, tp]] or [[2, 4], [fsdp, tp]]")


def test_replicas_divide_the_world() -> None:
    assert FSDP(replicas=2).axes(8) == {"replicate": 2, "fsdp": 4}
    with pytest.raises(ConfigError, match=r"8 processes do not form 3 equal replicas.*use one of 1, 2, 4, 8"):
        check_replicas(3, 8)


def test_heads_that_tp_does_not_divide_are_named() -> None:
    config = LlamaConfig(num_attention_heads=8, num_key_value_heads=2, intermediate_size=64)
    check_divisible(config, 2)
    with pytest.raises(ConfigError, match="tp 4 does not divide the model's num_key_value_heads 2; use a tp of 1, 2"):
        check_divisible(config, 4)


def test_a_model_without_a_plan_says_what_it_can_use() -> None:
    with pytest.raises(ConfigError, match="gpt2 have no tensor-parallel plan; use the strategy fsdp or ddp"):
        check_plan(GPT2Config(), {"lm_head": "colwise_rep"})
    with pytest.raises(ConfigError, match="uses moe_tp_experts"):
        check_plan(LlamaConfig(), {"layers.*.mlp.experts": "moe_tp_experts", "layers.*.q_proj": "colwise"})


def test_words() -> None:
    assert strategy_for(None, 1) == "auto"
    assert isinstance(strategy_for("auto", 2), DDP)
    assert isinstance(strategy_for("ddp", 2), DDP)
    assert isinstance(strategy_for("fsdp", 2), FSDP)
    with pytest.raises(ConfigError, match=r"needs its mesh_shape; .*mesh_shape: \[\[1, 1\]"):
        strategy_for("model_parallel", 1)
    with pytest.raises(ConfigError, match="'ddpp' is not a strategy; use ddp"):
        strategy_for("ddpp", 2)
