"""A small catalogue for tests of what changes with the class: three classes that share some options."""

from __future__ import annotations

import pytest

from lightning_hub.config import Schema, shipped_schema
from lightning_hub.config.schema import ClassRecord

LORA: ClassRecord = {
    "name": "SampleLoRA",
    "path": "lightning_hub.sample.SampleLoRA",
    "defined": "lightning_hub.sample.module.SampleLoRA",
    "kind": "model",
    "options": [
        {"name": "model", "type": "str", "required": True},
        {"name": "learning_rate", "type": "float", "default": 1e-4},
        {"name": "r", "type": "int", "default": 8, "range": ">= 1"},
    ],
}


@pytest.fixture(scope="session")
def with_lora() -> Schema:
    """Return the shipped catalogue with one more model class."""
    return Schema((*shipped_schema().classes, *Schema.from_records([LORA]).classes))
