"""The shipped catalogue with one more model class, for tests of what a change of class does."""

from __future__ import annotations

import pytest
from hypothesis import settings

from lightning_hub.config.schema import ClassRecord, Schema, shipped_schema

settings.register_profile("hub", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("hub")

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
