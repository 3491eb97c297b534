"""What a checkpoint keeps of the recipe, so that a resume can name what has changed since."""

from __future__ import annotations

from typing import Any

KEYS = (
    "seed_everything",
    "trainer.precision",
    "trainer.gradient_clip_val",
    "trainer.gradient_clip_algorithm",
    "model.class_path",
)
"""What shapes a training beside the method's own options."""


def recipe_facts(tree: dict[str, Any]) -> dict[str, str]:
    """Return the method's options and what else of a recipe shapes the numbers, by their keys."""
    facts = {}
    for key in KEYS:
        value: Any = tree
        for word in key.split("."):
            value = (value or {}).get(word)
        facts[key] = str(value)
    return facts | {f"model.init_args.{name}": str(value) for name, value in tree["model"]["init_args"].items()}
