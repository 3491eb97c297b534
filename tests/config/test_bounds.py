"""Bounds are read from annotations, and hold for what Python code constructs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import pytest

from lightning_hub.checkpoints.settings import CheckpointSettings
from lightning_hub.config.bounds import Bounds, bounds_of
from lightning_hub.data.settings import DataSettings
from lightning_hub.errors import ConfigError


def test_bounds_are_found_alone_and_in_a_union() -> None:
    assert bounds_of(Annotated[int, Bounds(">= 1")]) == bounds_of(Annotated[int, Bounds(">= 1")] | None)
    assert bounds_of(int | None) is None


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("> 0", [1, 0.5], [0, -1]),
        (">= 0, < 1", [0, 0.99], [-0.1, 1]),
        ("<= 2", [2, -5], [2.5]),
        ("", [0], [float("inf")]),
    ],
)
def test_a_number_is_inside_or_outside(text: str, inside: list[float], outside: list[float]) -> None:
    assert all(Bounds(text).hold(value) for value in inside)
    assert not any(Bounds(text).hold(value) for value in outside)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: DataSettings("a.jsonl", max_seq_len=1), "data.init_args.max_seq_len"),
        (lambda: DataSettings("a.jsonl", max_seq_len=2.5), "data.init_args.max_seq_len"),  # type: ignore[arg-type]
        (lambda: DataSettings("a.jsonl", num_proc=True), "data.init_args.num_proc"),
        (lambda: DataSettings("a.jsonl", max_example_mb=3000), "data.init_args.max_example_mb"),
        (lambda: CheckpointSettings(keep=1), "checkpoint.keep"),
        (lambda: CheckpointSettings(every_minutes=0), "checkpoint.every_minutes"),
    ],
)
def test_a_class_refuses_what_is_outside(make: Callable[[], object], key: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make()
    assert raised.value.where == key
    assert raised.value.remedy
